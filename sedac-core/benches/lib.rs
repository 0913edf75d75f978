//! Nothing: the package is its benches. `cargo bench --manifest-path sedac-core/benches/Cargo.toml`
