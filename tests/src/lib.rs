//! Black-box suites, the test control plane, benchmarks.
