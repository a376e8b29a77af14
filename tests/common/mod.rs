//! What the tests share: real servers, stores that can be made to fail, and a service behind the layer.

#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]

pub mod app;
pub mod browser;
pub mod cluster;
pub mod metrics;
pub mod observed;
pub mod postgres;
pub mod proxy;
pub mod redis;
pub mod scratch;
pub mod sentinel;
pub mod server;
pub mod stores;

use std::env;
use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tokio::time::{sleep, timeout};

/// Returns when something holds, which it has to before long.
pub async fn until(mut holds: impl AsyncFnMut() -> bool) {
    let looks = async {
        while !holds().await {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(90), looks).await.expect("it to hold before long");
}

/// A command that, where there is `setpriv`, does not outlive a test that is killed.
pub fn mortal(program: impl AsRef<OsStr>) -> Command {
    through_setpriv(program, &["--pdeathsig", "KILL"])
}

/// A command that is run with these settings of `setpriv`, where there is one.
pub fn through_setpriv(program: impl AsRef<OsStr>, settings: &[&str]) -> Command {
    let setpriv = Path::new("/usr/bin/setpriv");
    if !setpriv.exists() {
        return Command::new(program);
    }
    let mut command = Command::new(setpriv);
    command.args(settings).arg(program);
    command
}

/// An example, which Cargo builds with the tests, beside them.
pub fn example(name: &str) -> Command {
    let target = env::current_exe().expect("a test");
    let built = target.parent().and_then(Path::parent).expect("the directory of a profile");
    mortal(built.join("examples").join(name))
}

/// Sends a process a signal, such as `STOP` and `CONT`.
pub fn signal(pid: u32, signal: &str) {
    let status = Command::new("kill").args(["-s", signal, &pid.to_string()]).status().expect("kill");
    assert!(status.success(), "{signal} does not reach {pid}");
}
