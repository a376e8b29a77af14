//! The scripts, and how they are called: by hash, and in full where the server does not know them.

use std::sync::LazyLock;

use redis::{Cmd, ErrorKind, Pipeline, ServerErrorKind, Value};

use super::connection::Connector;
use super::failure::Failure;

/// One atomic step on one key.
#[derive(Debug)]
pub(super) struct Script {
    code: &'static str,
    hash: String,
}

/// A script that ends a claim: finished work is stored even where the server is out of memory and refuses new claims.
#[derive(Debug)]
pub(super) struct AllowOom {
    pub(super) flagged: LazyLock<Script>,
    /// For servers before 7.0, which know no flags: there a script may write on when it has written, so where its first write
    /// takes memory there is one before it that changes nothing.
    pub(super) plain: LazyLock<Script>,
}

macro_rules! script {
    ($first:literal, $($file:literal),+) => {
        LazyLock::new(|| Script::new(concat!($first, $(include_str!($file)),+)))
    };
}

macro_rules! allow_oom {
    (after $plain:literal, $($file:literal),+) => {
        AllowOom { flagged: script!("#!lua flags=allow-oom\n", $($file),+), plain: script!($plain, $($file),+) }
    };
    ($($file:literal),+) => {
        allow_oom!(after "redis.pcall('RENAME', KEYS[1], KEYS[1])\n", $($file),+)
    };
}

pub(super) static CLAIM: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("claim.lua")));
pub(super) static TAKEOVER: LazyLock<Script> = script!("", "head.lua", "takeover.lua");
pub(super) static RENEW: LazyLock<Script> = script!("", "head.lua", "renew.lua");
pub(super) static FORGET: LazyLock<Script> = script!("", "head.lua", "forget.lua");
pub(super) static COMPLETE_STAGED: AllowOom = allow_oom!(after "", "head.lua", "complete_staged.lua");
pub(super) static COMPLETE: AllowOom = allow_oom!("complete_at_once.lua", "head.lua", "complete.lua");
pub(super) static RELEASE: AllowOom = allow_oom!("head.lua", "release.lua");

impl Script {
    fn new(code: &'static str) -> Self {
        Self { code, hash: redis::Script::new(code).get_hash().to_owned() }
    }

    /// Calls the script on one key. `NOSCRIPT` is answered by sending the code, which loads it on the one node that
    /// lacks it.
    pub(super) fn call(
        &self,
        connector: &Connector,
        key: &str,
        args: &[&[u8]],
    ) -> impl Future<Output = Result<Value, Failure>> {
        async move {
            match connector.query(key, &command("EVALSHA", &self.hash, &[key], args)).await {
                Err(failure) if is_unknown(&failure) => {
                    Box::pin(self.call_whole(connector, key, args)).await.map_err(|next| failure.and_then(next))
                }
                answer => answer,
            }
        }
    }

    /// Calls it by its code.
    pub(super) async fn call_whole(&self, connector: &Connector, key: &str, args: &[&[u8]]) -> Result<Value, Failure> {
        connector.query(key, &command("EVAL", self.code, &[key], args)).await
    }

    /// Calls it on a key and on a value that is staged beside it, in one round trip.
    pub(super) async fn call_staged(
        &self,
        connector: &Connector,
        keys: [&str; 2],
        stage: &Cmd,
        args: &[&[u8]],
    ) -> Result<Value, Failure> {
        let mut staged = Pipeline::new();
        staged.add_command(stage.clone()).add_command(command("EVALSHA", &self.hash, &keys, args));
        match connector.query_all(keys[0], &staged).await {
            Err(failure) if is_unknown(&failure) => {
                let answer = Box::pin(connector.query(keys[0], &command("EVAL", self.code, &keys, args))).await;
                answer.map_err(|next| failure.and_then(next))
            }
            answers => Ok(answers?.pop().unwrap_or(Value::Nil)),
        }
    }
}

/// Whether the server does not know the script.
fn is_unknown(failure: &Failure) -> bool {
    failure.error().kind() == ErrorKind::Server(ServerErrorKind::NoScript)
}

fn command(name: &str, script: &str, keys: &[&str], args: &[&[u8]]) -> Cmd {
    let size = keys.iter().map(|key| key.len()).chain(args.iter().map(|arg| arg.len())).sum::<usize>();
    let mut command = sized(name, 2 + keys.len() + args.len(), script.len() + 1 + size);
    command.arg(script).arg(keys.len()).arg(keys).arg(args);
    command
}

/// A command with room for as many arguments, which take so many bytes together: by itself it would grow with each of them.
pub(super) fn sized(name: &str, args: usize, size: usize) -> Cmd {
    let mut command = Cmd::with_capacity(1 + args, name.len() + size);
    command.arg(name);
    command
}
