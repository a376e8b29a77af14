//! What the figures were made with.

use std::fs;
use std::process::Command;
use std::thread::available_parallelism;

use anyhow::{Context as _, Result};

pub struct Machine {
    pub cpu: String,
    pub cores: usize,
    pub kernel: String,
    pub rustc: String,
    pub redis: String,
}

impl Machine {
    pub fn look(redis_server: &str) -> Result<Self> {
        let cpus = fs::read_to_string("/proc/cpuinfo")?;
        let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        Ok(Self {
            cpu: model.map_or("a CPU without a name", |(_, name)| name.trim()).to_owned(),
            cores: available_parallelism()?.get(),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            rustc: version(&["rustc", "--version"])?,
            // `Redis server v=7.0.15 sha=…`
            redis: version(&[redis_server, "--version"])?.split(" sha=").next().unwrap_or_default().to_owned(),
        })
    }
}

/// Whether there is such a program.
pub fn has(program: &str) -> bool {
    version(&[program, "--version"]).is_ok()
}

fn version(command: &[&str]) -> Result<String> {
    let said = Command::new(command[0]).args(&command[1..]).output().with_context(|| format!("{command:?}"))?;
    Ok(String::from_utf8_lossy(&said.stdout).trim().to_owned())
}
