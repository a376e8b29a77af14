//! Whether the clusters and sentinels that the tests start do what real ones do: what is tried on them rests on that.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]

mod common;

use redis::AsyncCommands as _;
use redis::cluster::ClusterClient;
use redis::sentinel::{SentinelClientBuilder, SentinelServerType};
use tokio::time::{Instant, timeout};

use common::cluster::{Cluster, NODE_TIMEOUT};
use common::sentinel::Sentinels;
use common::until;

#[tokio::test]
async fn a_cluster_serves_moves_slots_and_survives_the_loss_of_an_owner() {
    let mut cluster = Cluster::start().await;
    let client = ClusterClient::new(cluster.urls()).unwrap();
    let mut connection = client.get_async_connection().await.unwrap();
    for n in 0..100 {
        let () = connection.set(format!("{{slot}}:{n}"), n).await.unwrap();
    }
    let slot = cluster.slot("{slot}:0").await;
    let owner = cluster.owner_of(slot, 0).await;
    let next = (owner + 1) % 3;
    cluster.migrate(slot, owner, next).await;
    assert_eq!(cluster.owner_of(slot, next).await, next);
    for n in 0..100 {
        assert_eq!(connection.get::<_, u32>(format!("{{slot}}:{n}")).await.unwrap(), n);
    }
    cluster.is_replicated(next).await;
    cluster.kill(next);
    let killed = Instant::now();
    let replica = Cluster::replica_of(next);
    until(async || cluster.owner_of(slot, replica).await == replica).await;
    assert!(killed.elapsed() > NODE_TIMEOUT, "{:?}", killed.elapsed());
    drop(connection);
    let mut connection = client.get_async_connection().await.unwrap();
    let get = async || matches!(timeout(NODE_TIMEOUT, connection.clone().get::<_, u32>("{slot}:7")).await, Ok(Ok(7)));
    until(get).await;
    let _: () = connection.set("{slot}:100", 100).await.unwrap();
}

#[tokio::test]
async fn sentinels_promote_the_replica_of_a_master_that_they_cannot_reach() {
    let sentinels = Sentinels::start().await;
    let client = |server_type| {
        let nodes =
            sentinels.urls().into_iter().map(|url| redis::IntoConnectionInfo::into_connection_info(url).unwrap());
        let builder = SentinelClientBuilder::new(nodes.map(|info| info.addr().clone()), "orders", server_type).unwrap();
        builder.set_client_to_redis_username("app").set_client_to_redis_password("secret").build().unwrap()
    };
    let mut old = client(SentinelServerType::Master).get_async_connection().await.unwrap();
    let () = old.set("before", 1).await.unwrap();
    sentinels.is_replicated().await;
    sentinels.part().await;
    let () = old.set("parted", 1).await.unwrap();
    sentinels.has_failed_over().await;
    let mut new = client(SentinelServerType::Master).get_async_connection().await.unwrap();
    let found: (Option<u32>, Option<u32>) = new.mget(&["before", "parted"]).await.unwrap();
    assert_eq!(found, (Some(1), None), "what the old master was told is not known to the new one");
    sentinels.heal().await;
    assert!(old.set::<_, _, ()>("healed", 1).await.is_err(), "the old master is a replica");
}
