//! What one request costs in things that can be counted.

use anyhow::{Context as _, Result};

use crate::load::{Load, Mode, Until};
use crate::redis_server::{Commands, RedisServer};
use crate::running::Running;
use crate::servers::Server;

/// Requests that commands and bytes are counted over, on one connection.
const COUNTED: u64 = 200;

/// Two runs in callgrind, of so many requests on each connection; what they differ by is the requests' alone.
const SHORT: u64 = 100;
const LONG: u64 = 600;
const CONNECTIONS: usize = 4;

/// Of one request each.
pub struct Costs {
    pub first: Counted,
    pub duplicate: Counted,
    /// That one first delivery leaves in Redis.
    pub bytes: f64,
}

pub struct Counted {
    pub sent: f64,
    pub in_scripts: f64,
    pub instructions: Option<f64>,
}

pub async fn count(servers: &[Server], redis: &mut RedisServer, callgrind: bool) -> Result<Vec<Costs>> {
    let mut costs = Vec::new();
    eprint!("counting:");
    for server in servers {
        eprint!(" {}", server.name);
        costs.push(of(server, redis, callgrind).await.with_context(|| format!("counting for {}", server.name))?);
    }
    eprintln!();
    Ok(costs)
}

async fn of(server: &Server, redis: &mut RedisServer, callgrind: bool) -> Result<Costs> {
    let (first, bytes) = counted(server, redis, Mode::New, callgrind).await?;
    let (duplicate, _) = counted(server, redis, Mode::Duplicate, callgrind).await?;
    Ok(Costs { first, duplicate, bytes })
}

async fn counted(server: &Server, redis: &mut RedisServer, mode: Mode, callgrind: bool) -> Result<(Counted, f64)> {
    let (Commands { sent, in_scripts }, bytes) = commands(server, redis, mode).await?;
    let instructions = if callgrind { Some(instructions(server, redis, mode).await?) } else { None };
    Ok((Counted { sent: per_request(sent), in_scripts: per_request(in_scripts), instructions }, per_request(bytes)))
}

fn per_request(counted: u64) -> f64 {
    counted as f64 / COUNTED as f64
}

async fn commands(server: &Server, redis: &mut RedisServer, mode: Mode) -> Result<(Commands, u64)> {
    redis.flush().await?;
    let running = Running::start(server, &redis.url())?;
    let mut load = Load::connect(running.target, mode, 1, "commands").await?;
    // Connects to Redis, and loads the scripts there.
    load.send(Until::Each(1)).await?;
    let before = redis.memory().await?;
    let monitor = redis.monitor().await?;
    load.send(Until::Each(COUNTED)).await?;
    let commands = redis.seen_by(monitor).await?;
    let bytes = redis.memory().await?.saturating_sub(before);
    Ok((commands, bytes))
}

async fn instructions(server: &Server, redis: &mut RedisServer, mode: Mode) -> Result<f64> {
    let short = run_in_callgrind(server, redis, mode, SHORT).await?;
    let long = run_in_callgrind(server, redis, mode, LONG).await?;
    let requests = (LONG - SHORT) * CONNECTIONS as u64;
    Ok((long as f64 - short as f64) / requests as f64)
}

async fn run_in_callgrind(server: &Server, redis: &mut RedisServer, mode: Mode, each: u64) -> Result<u64> {
    redis.flush().await?;
    let running = Running::start_in_callgrind(server, &redis.url())?;
    Load::connect(running.target, mode, CONNECTIONS, "callgrind").await?.send(Until::Each(each)).await?;
    running.instructions().await
}
