//! Processes that end with the harness, however that ends.

use std::collections::HashMap;
use std::convert::Infallible;
use std::env;
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};
use tokio::io::AsyncReadExt as _;
use tokio::process::ChildStderr;

/// The first argument of this program when it is started to become another one: [`become_bound`].
pub const BOUND: &str = "bound";

/// A child, killed when dropped.
pub struct Process(Child);

/// The nanoseconds that each thread of a process has run.
pub struct Cpu(HashMap<String, u64>);

// === impl Process ===

impl Process {
    /// Starts a program. It has to be called on the main thread: the child dies with the thread that started it.
    pub fn start(command: &[&str], stdout: Stdio, stderr: Stdio) -> Result<Self> {
        let this = env::current_exe().context("finding this program")?;
        let mut start = Command::new(this);
        start.arg(BOUND).args(command).stdin(Stdio::null()).stdout(stdout).stderr(stderr);
        Ok(Self(start.spawn().with_context(|| format!("starting {command:?}"))?))
    }

    pub fn child(&mut self) -> &mut Child {
        &mut self.0
    }

    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.0.try_wait()?.is_some())
    }

    /// Ends the child as an operator would, which is when callgrind reports, and returns what it has to say.
    pub async fn terminate(mut self) -> Result<String> {
        let stderr = self.0.stderr.take().context("standard error is not piped")?;
        let mut stderr = ChildStderr::from_std(stderr)?;
        kill_process(Pid::from_child(&self.0), Signal::TERM)?;
        let mut said = String::new();
        stderr.read_to_string(&mut said).await?;
        Ok(said)
    }

    pub fn cpu(&self) -> Result<Cpu> {
        let mut threads = HashMap::new();
        for thread in fs::read_dir(format!("/proc/{}/task", self.0.id()))? {
            let thread = thread?;
            // It may have ended since it was listed.
            let Ok(schedstat) = fs::read_to_string(thread.path().join("schedstat")) else { continue };
            let ran = schedstat.split_whitespace().next().context("an empty schedstat")?.parse()?;
            threads.insert(thread.file_name().to_string_lossy().into_owned(), ran);
        }
        if threads.is_empty() {
            bail!("the kernel does not say how long threads run");
        }
        Ok(Cpu(threads))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

// === impl Cpu ===

impl Cpu {
    /// The microseconds from an earlier look to this one. What threads ran that have ended in between is not in it.
    pub fn since(&self, earlier: &Self) -> f64 {
        let nanoseconds: u64 =
            self.0.iter().map(|(thread, ran)| ran - earlier.0.get(thread).copied().unwrap_or(0).min(*ran)).sum();
        nanoseconds as f64 / 1000.0
    }
}

/// Becomes another program, which dies with the process that has started this one.
pub fn become_bound(command: &[String]) -> Result<Infallible> {
    let Some((program, args)) = command.split_first() else { bail!("`{BOUND}` needs a command") };
    set_parent_process_death_signal(Some(Signal::KILL))?;
    Err(Command::new(program).args(args).exec()).with_context(|| format!("starting {program}"))
}
