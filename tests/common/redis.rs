//! A `redis-server` of the test's own.

use std::env;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, RedisResult};
use tower_idempotency::store::redis::RedisStore;

use super::scratch::Scratch;
use super::signal;

/// How long a server may take to start on a busy machine, and how often it is looked at.
const LOOKS: u32 = 4000;
const PAUSE: Duration = Duration::from_millis(5);

/// How long a test's own connections wait for an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// A server in a directory of its own, without persistence unless it is set; killed when dropped.
pub struct RedisServer {
    child: Child,
    /// The option that names the port.
    listen: &'static str,
    port: u16,
    args: Vec<String>,
    dir: Scratch,
}

impl RedisServer {
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// Starts with more settings, as on the command line.
    pub fn start_with(args: &[&str]) -> Self {
        Self::start_at("--port", free_port, args)
    }

    /// Starts a node of a cluster, which takes a second port 10000 above its own.
    pub fn start_node(args: &[&str]) -> Self {
        Self::start_at("--port", free_ports, args)
    }

    /// Starts with TLS, and nothing else, on its port. It may be a node of a cluster.
    pub fn start_with_tls(args: &[&str]) -> Self {
        Self::start_at("--tls-port", free_ports, args)
    }

    fn start_at(listen: &'static str, port: fn() -> u16, args: &[&str]) -> Self {
        let args: Vec<String> = args.iter().map(|&arg| arg.to_owned()).collect();
        for _ in 0..5 {
            let (port, dir) = (port(), Scratch::new());
            let child = spawn(listen, port, dir.path(), &args);
            let mut server = Self { child, listen, port, args: args.clone(), dir };
            if server.is_up() {
                return server;
            }
        }
        panic!("redis-server does not start");
    }

    /// Whether the server came up; it does not if somebody else took its port.
    fn is_up(&mut self) -> bool {
        for _ in 0..LOOKS {
            if self.child.try_wait().expect("its own child").is_some() {
                return false;
            }
            if TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).is_ok() {
                return true;
            }
            std::thread::sleep(PAUSE);
        }
        false
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn store(&self) -> RedisStore {
        RedisStore::new(&self.url()).expect("a URL")
    }

    /// A plain connection, to look at what a store has done and to do it harm.
    pub async fn client(&self) -> MultiplexedConnection {
        connect(&self.url()).await.expect("a running server")
    }

    /// Stops the server from answering, without closing anything.
    pub fn freeze(&self) {
        signal(self.child.id(), "STOP");
    }

    pub fn thaw(&self) {
        signal(self.child.id(), "CONT");
    }

    pub fn kill(&mut self) {
        self.child.kill().expect("its own child");
        self.child.wait().expect("its own child");
    }

    /// Starts the server again on its port, with what it has on disk: nothing, unless its settings say so.
    pub fn restart(&mut self) {
        self.child = spawn(self.listen, self.port, self.dir.path(), &self.args);
        assert!(self.is_up(), "redis-server does not start again");
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The server that is tried: another version, or Valkey, where the environment says so.
pub fn program() -> String {
    env::var("REDIS_SERVER").unwrap_or_else(|_| "redis-server".to_owned())
}

/// A connection that does not give up when the machine stands still for half a second.
pub async fn connect(url: &str) -> RedisResult<MultiplexedConnection> {
    let config =
        AsyncConnectionConfig::new().set_response_timeout(Some(PATIENCE)).set_connection_timeout(Some(PATIENCE));
    Client::open(url)?.get_multiplexed_async_connection_with_config(&config).await
}

pub fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    listener.local_addr().expect("a bound socket").port()
}

/// A free port, with the one 10000 above it.
fn free_ports() -> u16 {
    let is_free = |port: u16| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
    let both = |port: &u16| port.checked_add(10_000).is_some_and(is_free);
    (0..1000).map(|_| free_port()).find(both).expect("two free ports")
}

fn spawn(listen: &str, port: u16, dir: &Path, args: &[String]) -> Child {
    let mut command = super::mortal(program());
    command.args(["--port", "0", listen, &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
    // What a replica receives it writes to a file.
    command.arg("--dir").arg(dir).args(args);
    let spawned = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    spawned.expect("redis-server has to be installed: ./tests/run says how")
}
