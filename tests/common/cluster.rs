//! A Redis Cluster of the test's own: three masters, and a replica of each.

use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{FromRedisValue, Value, cmd, from_redis_value};
use tokio::time::sleep;
use tower_idempotency::store::redis::RedisStore;

use super::redis::RedisServer;
use super::until;

const MASTERS: usize = 3;
const SLOTS: usize = 16 << 10;

/// How long a node is silent before the others take it for dead.
pub const NODE_TIMEOUT: Duration = Duration::from_secs(2);

/// The masters come first, and their replicas in the same order.
pub struct Cluster {
    nodes: Vec<RedisServer>,
    clients: Vec<MultiplexedConnection>,
    ids: Vec<String>,
}

impl Cluster {
    pub async fn start() -> Self {
        let timeout = NODE_TIMEOUT.as_millis().to_string();
        let args = [
            ["--cluster-enabled", "yes"],
            ["--cluster-node-timeout", &timeout],
            ["--cluster-replica-validity-factor", "0"],
            ["--cluster-allow-replica-migration", "no"],
            ["--repl-diskless-sync-delay", "0"],
        ];
        let nodes: Vec<_> = (0..2 * MASTERS).map(|_| RedisServer::start_node(args.as_flattened())).collect();
        let (mut clients, mut ids) = (Vec::new(), Vec::new());
        for node in &nodes {
            let mut client = node.client().await;
            ids.push(cmd("CLUSTER").arg("MYID").query_async(&mut client).await.unwrap());
            clients.push(client);
        }
        let cluster = Self { nodes, clients, ids };
        cluster.join().await;
        cluster
    }

    async fn join(&self) {
        for node in 0..self.nodes.len() {
            let () = self.cluster(node, &["SET-CONFIG-EPOCH", &(node + 1).to_string()]).await;
            let () = self.cluster(node, &["MEET", "127.0.0.1", &self.nodes[0].port().to_string()]).await;
        }
        for master in 0..MASTERS {
            let [from, to] = [master, master + 1].map(|n| SLOTS * n / MASTERS);
            let () = self.cluster(master, &["ADDSLOTSRANGE", &from.to_string(), &(to - 1).to_string()]).await;
        }
        for replica in MASTERS..self.nodes.len() {
            // A node replicates only whom it has heard of.
            until(async || self.try_cluster::<()>(replica, &["REPLICATE", &self.ids[replica - MASTERS]]).await.is_ok())
                .await;
        }
        for node in 0..self.nodes.len() {
            until(async || self.info(node, &["CLUSTER", "INFO"]).await.contains("cluster_state:ok")).await;
        }
        for replica in MASTERS..self.nodes.len() {
            until(async || self.info(replica, &["INFO", "replication"]).await.contains("master_link_status:up")).await;
            // The others have to know it as a replica too, or they do not let it take over.
            until(async || {
                let nodes = self.info(0, &["CLUSTER", "NODES"]).await;
                nodes.lines().filter(|node| node.contains(" slave ") || node.contains(",slave ")).count() == MASTERS
            })
            .await;
        }
    }

    pub fn urls(&self) -> Vec<String> {
        self.nodes.iter().map(RedisServer::url).collect()
    }

    pub fn store(&self) -> RedisStore {
        let urls = self.urls();
        RedisStore::cluster(&urls.iter().map(String::as_str).collect::<Vec<_>>()).expect("URLs")
    }

    /// The slot of a key.
    pub async fn slot(&self, key: &str) -> u16 {
        self.cluster(0, &["KEYSLOT", key]).await
    }

    /// Who has a slot, as this node knows it.
    pub async fn owner_of(&self, slot: u16, asked: usize) -> usize {
        let ranges: Vec<(u16, u16, Vec<Value>)> = {
            // Behind the owner come its replicas.
            let ranges: Vec<Vec<Value>> = self.cluster(asked, &["SLOTS"]).await;
            let owned = |range: &Vec<Value>| from_redis_value(Value::Array(range[..3].to_vec())).unwrap();
            ranges.iter().map(owned).collect()
        };
        let (_, _, owner) = ranges.into_iter().find(|(from, to, _)| (*from..=*to).contains(&slot)).expect("an owner");
        let port: u16 = from_redis_value(owner[1].clone()).unwrap();
        self.nodes.iter().position(|node| node.port() == port).expect("one of the nodes")
    }

    /// The replica that a master started with.
    pub const fn replica_of(master: usize) -> usize {
        master + MASTERS
    }

    /// Returns when the replica of a master has all that the master has.
    pub async fn is_replicated(&self, master: usize) {
        until(async || {
            let info = self.info(master, &["INFO", "replication"]).await;
            let field = |name: &str| info.split(['\r', '\n', ',']).find_map(|field| field.strip_prefix(name));
            let offset = field("master_repl_offset:");
            offset.is_some() && field("offset=") == offset
        })
        .await;
    }

    pub fn freeze(&self, node: usize) {
        self.nodes[node].freeze();
    }

    pub fn thaw(&self, node: usize) {
        self.nodes[node].thaw();
    }

    pub fn kill(&mut self, node: usize) {
        self.nodes[node].kill();
    }

    /// Moves a slot to another master, key by key, as a resharding does.
    pub async fn migrate(&self, slot: u16, from: usize, to: usize) {
        let name = slot.to_string();
        let () = self.cluster(to, &["SETSLOT", &name, "IMPORTING", &self.ids[from]]).await;
        let () = self.cluster(from, &["SETSLOT", &name, "MIGRATING", &self.ids[to]]).await;
        loop {
            let keys: Vec<String> = self.cluster(from, &["GETKEYSINSLOT", &name, "4"]).await;
            if keys.is_empty() {
                break;
            }
            let mut migrate = cmd("MIGRATE");
            migrate.arg("127.0.0.1").arg(self.nodes[to].port()).arg("").arg(0).arg(10_000).arg("KEYS").arg(keys);
            let _: String = migrate.query_async(&mut self.clients[from].clone()).await.unwrap();
            sleep(Duration::from_millis(5)).await;
        }
        // Who imports it first: else nobody would have it for a moment.
        let others = (0..MASTERS).filter(|node| *node != to);
        for node in [to].into_iter().chain(others) {
            let () = self.cluster(node, &["SETSLOT", &name, "NODE", &self.ids[to]]).await;
        }
    }

    async fn cluster<T: FromRedisValue>(&self, node: usize, args: &[&str]) -> T {
        self.try_cluster(node, args).await.unwrap()
    }

    async fn try_cluster<T: FromRedisValue>(&self, node: usize, args: &[&str]) -> redis::RedisResult<T> {
        cmd("CLUSTER").arg(args).query_async(&mut self.clients[node].clone()).await
    }

    async fn info(&self, node: usize, command: &[&str]) -> String {
        cmd(command[0]).arg(&command[1..]).query_async(&mut self.clients[node].clone()).await.unwrap()
    }
}
