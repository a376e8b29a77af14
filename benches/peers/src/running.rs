//! A server in a process of its own.

use std::env;
use std::io::{BufRead as _, BufReader};
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;

use crate::load::{Client, Target};
use crate::process::{Cpu, Process};
use crate::servers::{Role, Server};

/// The first argument of this program when it is started as a server.
pub const SERVE: &str = "serve";

const CALLGRIND: [&str; 3] = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"];

pub struct Running {
    process: Process,
    pub target: Target,
    _dir: TempDir,
}

impl Running {
    pub fn start(server: &Server, redis: &str) -> Result<Self> {
        Self::start_by(&[], server, redis, Stdio::inherit())
    }

    /// To be ended by [`instructions`](Self::instructions).
    pub fn start_in_callgrind(server: &Server, redis: &str) -> Result<Self> {
        Self::start_by(&CALLGRIND, server, redis, Stdio::piped())
    }

    fn start_by(by: &[&str], server: &Server, redis: &str, stderr: Stdio) -> Result<Self> {
        let dir = TempDir::new()?;
        let this = env::current_exe()?;
        let this = this.to_str().context("a program whose name is not UTF-8")?;
        let place = dir.path().to_str().context("a directory whose name is not UTF-8")?;
        let command = [by, &[this, SERVE, server.name, redis, place]].concat();
        let mut process = Process::start(&command, Stdio::piped(), stderr)?;
        let mut port = String::new();
        BufReader::new(process.child().stdout.take().context("standard output is not piped")?).read_line(&mut port)?;
        let port = port.trim().parse().with_context(|| format!("{} does not start", server.name))?;
        Ok(Self { process, target: Target { port, signs_in: server.signs_in() }, _dir: dir })
    }

    pub fn cpu(&self) -> Result<Cpu> {
        self.process.cpu()
    }

    /// Ends the server, and returns how many instructions it ran.
    pub async fn instructions(self) -> Result<u64> {
        let said = self.process.terminate().await?;
        let collected = said.lines().find_map(|line| line.split_once("Collected : "));
        let (_, instructions) = collected.with_context(|| format!("callgrind reports nothing: {said}"))?;
        Ok(instructions.trim().parse()?)
    }
}

/// Whether a server does what it is measured for: answers a duplicate with the response of the first, unless it is bare.
pub async fn check(server: &Server, redis: &str) -> Result<()> {
    let running = Running::start(server, redis)?;
    let mut client = Client::connect(running.target, format!("check-{}", server.name)).await?;
    let first = client.order(0).await?.to_owned();
    let is_kept = client.order(0).await? == first;
    let is_told_apart = client.order(1).await? != first;
    ensure!(is_told_apart, "it answers one request with the response to another");
    ensure!(is_kept == (server.role != Role::Bare), "it does not keep the response, or does where nothing should");
    Ok(())
}
