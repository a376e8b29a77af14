//! A master, its replica, and the sentinels that watch them.

use std::fs;
use std::process::{Child, Stdio};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{RedisResult, Value, cmd};
use tower_idempotency::store::redis::RedisStore;

use super::redis::{RedisServer, connect, free_port, program};
use super::scratch::Scratch;
use super::{mortal, until};

const SENTINELS: usize = 3;
const NAME: &str = "orders";

/// Everybody has a user of its own, so that a server can be cut off from some and not from others.
const USERS: [&str; 3] = ["app", "replica", "sentinel"];

/// How long a master is silent before the sentinels take it for dead: long, so that a machine that stands still for a
/// moment is no fault of a test's, and short once the test has made one.
const PATIENCE: Duration = Duration::from_secs(10);
const IMPATIENCE: Duration = Duration::from_millis(500);

pub struct Sentinels {
    pub master: RedisServer,
    pub replica: RedisServer,
    sentinels: Vec<Sentinel>,
}

/// Killed when dropped.
struct Sentinel {
    child: Child,
    port: u16,
    _dir: Scratch,
}

// === impl Sentinels ===

impl Sentinels {
    pub async fn start() -> Self {
        let mut args = vec!["--user", "default", "off", "--masteruser", "replica", "--masterauth", "secret"];
        args.extend(USERS.iter().flat_map(|user| ["--user", user, "on", ">secret", "~*", "&*", "+@all"]));
        args.extend(["--repl-diskless-sync-delay", "0"]);
        let master = RedisServer::start_with(&args);
        let port = master.port().to_string();
        args.extend(["--replicaof", "127.0.0.1", &port]);
        let replica = RedisServer::start_with(&args);
        until(async || info(&replica).await.contains("master_link_status:up")).await;
        let sentinels = (0..SENTINELS).map(|_| Sentinel::start(&port)).collect();
        let started = Self { master, replica, sentinels };
        for sentinel in &started.sentinels {
            until(async || {
                let count = async |what| match sentinel.ask(&[what, NAME]).await {
                    Ok(Value::Array(known)) => known.len(),
                    _ => 0,
                };
                count("REPLICAS").await == 1 && count("SENTINELS").await == SENTINELS - 1
            })
            .await;
        }
        started
    }

    pub fn urls(&self) -> Vec<String> {
        self.sentinels.iter().map(|sentinel| format!("redis://127.0.0.1:{}/", sentinel.port)).collect()
    }

    /// What the master is called, and as whom an app connects to it.
    pub fn master_url() -> String {
        format!("redis://app:secret@{NAME}/0")
    }

    pub fn store(&self) -> RedisStore {
        let urls = self.urls();
        let urls: Vec<&str> = urls.iter().map(String::as_str).collect();
        RedisStore::sentinel(&urls, &Self::master_url()).expect("URLs")
    }

    /// Returns when the replica has all that the master has.
    pub async fn is_replicated(&self) {
        until(async || {
            let info = info(&self.master).await;
            let field = |name: &str| info.split(['\r', '\n', ',']).find_map(|field| field.strip_prefix(name));
            let offset = field("master_repl_offset:");
            offset.is_some() && field("offset=") == offset
        })
        .await;
    }

    pub async fn kill_master(&mut self) {
        self.take_for_dead_after(IMPATIENCE).await;
        self.master.kill();
    }

    /// Cuts the master off from its replica and from the sentinels, but not from the apps.
    pub async fn part(&self) {
        self.take_for_dead_after(IMPATIENCE).await;
        let mut master = client(&self.master).await.unwrap();
        for user in ["replica", "sentinel"] {
            let () = cmd("ACL").arg(&["SETUSER", user, "off"]).query_async(&mut master).await.unwrap();
            let _: u32 = cmd("CLIENT").arg(&["KILL", "USER", user]).query_async(&mut master).await.unwrap();
        }
    }

    /// Ends the partition: the old master becomes a replica of the new one.
    pub async fn heal(&self) {
        let mut master = client(&self.master).await.unwrap();
        for user in ["replica", "sentinel"] {
            let () = cmd("ACL").arg(&["SETUSER", user, "on"]).query_async(&mut master).await.unwrap();
        }
        until(async || info(&self.master).await.contains("master_link_status:up")).await;
    }

    /// Returns when all sentinels send clients to the replica, and it is one no more. They do not turn back after that.
    pub async fn has_failed_over(&self) {
        for sentinel in &self.sentinels {
            let port = self.replica.port().to_string();
            until(async || {
                let master = sentinel.ask(&["GET-MASTER-ADDR-BY-NAME", NAME]).await;
                master.is_ok_and(|master| redis::from_redis_value::<(String, String)>(master).unwrap().1 == port)
            })
            .await;
        }
        until(async || info(&self.replica).await.contains("role:master")).await;
        self.take_for_dead_after(PATIENCE).await;
    }

    async fn take_for_dead_after(&self, patience: Duration) {
        for sentinel in &self.sentinels {
            let millis = patience.as_millis().to_string();
            sentinel.ask(&["SET", NAME, "down-after-milliseconds", &millis]).await.unwrap();
        }
    }
}

// === impl Sentinel ===

impl Sentinel {
    fn start(master: &str) -> Self {
        let (port, dir) = (free_port(), Scratch::new());
        let config = format!(
            "port {port}\nbind 127.0.0.1\ndir {}\n\
             sentinel monitor {NAME} 127.0.0.1 {master} 2\n\
             sentinel auth-user {NAME} sentinel\nsentinel auth-pass {NAME} secret\n\
             sentinel down-after-milliseconds {NAME} {}\nsentinel failover-timeout {NAME} 4000\n",
            dir.path().display(),
            PATIENCE.as_millis()
        );
        let path = dir.path().join("sentinel.conf");
        fs::write(&path, config).expect("a file");
        let mut command = mortal(program());
        command.arg(path).arg("--sentinel").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self { child: command.spawn().expect("redis-server as a sentinel"), port, _dir: dir }
    }

    async fn ask(&self, args: &[&str]) -> RedisResult<Value> {
        let mut connection = connect(&format!("redis://127.0.0.1:{}/", self.port)).await?;
        cmd("SENTINEL").arg(args).query_async(&mut connection).await
    }
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A connection of an app's.
async fn client(server: &RedisServer) -> RedisResult<MultiplexedConnection> {
    connect(&format!("redis://app:secret@127.0.0.1:{}/", server.port())).await
}

/// Nothing in the moment in which it becomes a master or a replica: then it closes its connections.
async fn info(server: &RedisServer) -> String {
    let asked = async { cmd("INFO").arg("replication").query_async(&mut client(server).await?).await };
    asked.await.unwrap_or_default()
}
