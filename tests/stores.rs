//! Every store passes the suite that is exported for everyone's.

mod memory {
    use tower_idempotency::store::memory::MemoryStore;

    tower_idempotency::store_conformance!(#[tokio::test(start_paused = true)], async { (MemoryStore::new(), ()) });
}
