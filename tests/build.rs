//! Compiles the wire schemas that the tests' plugins speak.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = "../agent/proto";
    println!("cargo::rerun-if-changed={folder}");
    let schemas = [
        "plugin_registration.proto",
        "csi.proto",
        "device_plugin.proto",
        "pod_resources.proto",
        "dra_v1.proto",
        "dra_v1beta1.proto",
        "dra_health.proto",
    ]
    .map(|name| format!("{folder}/{name}"));
    let descriptors = protox::compile(schemas, [folder])?;
    tonic_prost_build::configure()
        .build_client(true)
        .build_server(true)
        .compile_fds(descriptors)?;
    Ok(())
}
