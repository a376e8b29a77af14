//! A `redis-server` of the harness's own.

use std::net::{Ipv4Addr, TcpListener};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, RedisResult, cmd};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::time::sleep;

use crate::process::{Cpu, Process};

/// What a monitor sees last.
const LAST: &str = "the last command that is counted";

/// Without persistence, in a directory of its own.
pub struct RedisServer {
    process: Process,
    port: u16,
    connection: MultiplexedConnection,
    _dir: TempDir,
}

/// Counts the commands that a Redis runs.
pub struct Monitor(BufReader<TcpStream>);

/// How many commands came from clients, and how many from scripts.
#[derive(Clone, Copy)]
pub struct Commands {
    pub sent: u64,
    pub in_scripts: u64,
}

// === impl RedisServer ===

impl RedisServer {
    pub async fn start(program: &str) -> Result<Self> {
        let dir = TempDir::new()?;
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let path = dir.path().to_str().context("a directory whose name is not UTF-8")?;
        let port_arg = port.to_string();
        let command =
            [program, "--port", &port_arg, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", path];
        let mut process = Process::start(&command, Stdio::null(), Stdio::inherit())?;
        let client = Client::open(url(port))?;
        // A flush takes as long as there is to be freed.
        let config = AsyncConnectionConfig::new().set_response_timeout(Some(Duration::from_secs(60)));
        for _ in 0..500 {
            if process.has_ended()? {
                bail!("{program} does not start");
            }
            if let Ok(connection) = client.get_multiplexed_async_connection_with_config(&config).await {
                return Ok(Self { process, port, connection, _dir: dir });
            }
            sleep(Duration::from_millis(20)).await;
        }
        bail!("{program} does not listen")
    }

    pub fn url(&self) -> String {
        url(self.port)
    }

    pub fn cpu(&self) -> Result<Cpu> {
        self.process.cpu()
    }

    pub async fn flush(&mut self) -> RedisResult<()> {
        cmd("FLUSHALL").arg("SYNC").exec_async(&mut self.connection).await
    }

    /// The bytes of all keys and values.
    pub async fn memory(&mut self) -> Result<u64> {
        let keys: Vec<Vec<u8>> = cmd("KEYS").arg("*").query_async(&mut self.connection).await?;
        let mut bytes = 0;
        for key in keys {
            let usage = cmd("MEMORY").arg("USAGE").arg(key).arg("SAMPLES").arg(0).to_owned();
            bytes += usage.query_async::<Option<u64>>(&mut self.connection).await?.unwrap_or(0);
        }
        Ok(bytes)
    }

    pub async fn monitor(&self) -> Result<Monitor> {
        let mut monitor = BufReader::new(TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).await?);
        monitor.write_all(b"MONITOR\r\n").await?;
        let mut answer = String::new();
        monitor.read_line(&mut answer).await?;
        ensure!(answer == "+OK\r\n", "MONITOR: {answer}");
        Ok(Monitor(monitor))
    }

    /// What a monitor has seen so far.
    pub async fn seen_by(&mut self, mut monitor: Monitor) -> Result<Commands> {
        cmd("ECHO").arg(LAST).exec_async(&mut self.connection).await?;
        let mut commands = Commands { sent: 0, in_scripts: 0 };
        let mut line = Vec::new();
        // `+1700000000.000000 [0 127.0.0.1:50000] "GET" "key"`, with `lua` for the address in a script.
        while monitor.0.read_until(b'\n', &mut line).await? != 0 {
            let text = String::from_utf8_lossy(&line);
            if text.contains(LAST) {
                return Ok(commands);
            }
            let (client, _) = text.split_once(']').with_context(|| format!("MONITOR: {text}"))?;
            if client.ends_with(" lua") {
                commands.in_scripts += 1;
            } else {
                commands.sent += 1;
            }
            line.clear();
        }
        bail!("the monitor was cut off")
    }
}

fn url(port: u16) -> String {
    format!("redis://127.0.0.1:{port}/")
}
