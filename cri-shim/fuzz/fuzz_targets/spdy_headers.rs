#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cri_shim::streaming::fuzz::spdy_headers(data));
