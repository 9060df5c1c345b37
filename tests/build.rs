//! Compiles the wire schemas that the tests' CSI driver serves.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = "../agent/proto";
    println!("cargo::rerun-if-changed={folder}");
    let schemas = ["plugin_registration.proto", "csi.proto"].map(|name| format!("{folder}/{name}"));
    let descriptors = protox::compile(schemas, [folder])?;
    tonic_prost_build::configure()
        .build_client(false)
        .build_server(true)
        .compile_fds(descriptors)?;
    Ok(())
}
