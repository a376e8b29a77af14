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

mod postgres {
    use crate::common::postgres::PostgresServer;

    tower_idempotency::store_conformance!(#[tokio::test], async {
        let server = PostgresServer::shared();
        (server.store().await, server)
    });
}

mod sqlite {
    use tower_idempotency::SqliteStore;

    use crate::common::scratch::Scratch;

    tower_idempotency::store_conformance!(#[tokio::test], async {
        let dir = Scratch::new();
        (SqliteStore::open(dir.path().join("store.db")).await.unwrap(), dir)
    });
}
