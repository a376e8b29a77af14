//! The README's code is tested with the docs; this is what code cannot show.

#[test]
fn the_readme_names_this_version() {
    let readme = include_str!("../README.md");
    let version = concat!(env!("CARGO_PKG_VERSION_MAJOR"), ".", env!("CARGO_PKG_VERSION_MINOR"));
    assert!(readme.contains(&format!("tower-idempotency = {{ version = \"{version}\"")));
    assert!(readme.contains(concat!("Rust ", env!("CARGO_PKG_RUST_VERSION"))));
}
