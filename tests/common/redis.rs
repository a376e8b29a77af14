//! A `redis-server` of the test's own.

use std::env;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tower_idempotency::store::redis::RedisStore;

/// How long a server may take to start on a busy machine, and how often it is looked at.
const LOOKS: u32 = 4000;
const PAUSE: Duration = Duration::from_millis(5);

/// A server without persistence, killed when dropped.
pub struct RedisServer {
    child: Child,
    port: u16,
    args: Vec<String>,
}

impl RedisServer {
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// Starts with more settings, as on the command line.
    pub fn start_with(args: &[&str]) -> Self {
        let args: Vec<String> = args.iter().map(|&arg| arg.to_owned()).collect();
        for _ in 0..5 {
            let port = free_port();
            let mut server = Self { child: spawn(port, &args), port, args: args.clone() };
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
    pub async fn client(&self) -> redis::aio::MultiplexedConnection {
        let client = redis::Client::open(self.url()).expect("a URL");
        client.get_multiplexed_async_connection().await.expect("a running server")
    }

    /// Stops the server from answering, without closing anything.
    pub fn freeze(&self) {
        self.signal("STOP");
    }

    pub fn thaw(&self) {
        self.signal("CONT");
    }

    pub fn kill(&mut self) {
        self.child.kill().expect("its own child");
        self.child.wait().expect("its own child");
    }

    /// Starts the server again on its port, empty.
    pub fn restart(&mut self) {
        self.child = spawn(self.port, &self.args);
        assert!(self.is_up(), "redis-server does not start again");
    }

    fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        let status = Command::new("kill").args(["-s", signal, &pid]).status().expect("kill");
        assert!(status.success());
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    listener.local_addr().expect("a bound socket").port()
}

fn spawn(port: u16, args: &[String]) -> Child {
    // Another version or Valkey, where that is to be tried.
    let server = env::var("REDIS_SERVER").unwrap_or_else(|_| "redis-server".to_owned());
    let mut command = super::mortal(&server);
    let port = port.to_string();
    command.args(["--port", &port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
    // What a replica receives it writes to a file.
    command.args(["--dir", env!("CARGO_TARGET_TMPDIR"), "--dbfilename", &format!("{port}.rdb")]).args(args);
    let spawned = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    spawned.expect("redis-server has to be installed: ./tests/run says how")
}
