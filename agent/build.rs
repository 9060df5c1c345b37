//! Compiles the agent's wire schemas with protox, so that no system protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let schemas = [
        "proto/grpc_health.proto",
        "proto/plugin_registration.proto",
        "proto/csi.proto",
        "proto/device_plugin.proto",
        "proto/pod_resources.proto",
        "proto/dra_v1.proto",
        "proto/dra_v1beta1.proto",
        "proto/dra_health.proto",
    ];
    let descriptors = protox::compile(schemas, ["proto"])?;
    // The server half serves tests.
    tonic_prost_build::configure()
        .build_client(true)
        .build_server(true)
        // What is written down of these is compared.
        .btree_map(".v1beta1")
        .compile_fds(descriptors)?;
    Ok(())
}
