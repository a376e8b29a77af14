//! Every store passes the suite that is exported for everyone's.

mod common;

mod memory {
    use tower_idempotency::store::memory::MemoryStore;

    tower_idempotency::store_conformance!(#[tokio::test(start_paused = true)], async { (MemoryStore::new(), ()) });
}

mod redis {
    use crate::common::redis::RedisServer;

    tower_idempotency::store_conformance!(#[tokio::test], async {
        let server = RedisServer::start();
        (server.store(), server)
    });
}
