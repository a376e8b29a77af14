//! Measures all servers in turns. Single figures differ by a third from one minute to the next, ratios of neighbours do not.

use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::load::{Load, Mode, Until};
use crate::redis_server::RedisServer;
use crate::running::Running;
use crate::servers::Server;

/// Before each measurement, on its connections.
const WARM_UP: Duration = Duration::from_millis(60);

/// After the start of a server.
const START: Duration = Duration::from_millis(200);

pub struct Plan {
    pub modes: Vec<Mode>,
    pub connections: Vec<usize>,
    pub rounds: usize,
    pub lasts: Duration,
}

/// One mode with so many connections.
pub struct Cell {
    pub mode: Mode,
    pub connections: usize,
    /// By server, then by round.
    pub measured: Vec<Vec<Measured>>,
}

/// Of one server, in one round. The times are microseconds.
#[derive(Clone, Copy)]
pub struct Measured {
    pub per_second: f64,
    pub p50: f64,
    pub p99: f64,
    /// Per request, as are those of Redis.
    pub server_cpu: f64,
    pub redis_cpu: f64,
}

/// Every round has servers of its own and an empty Redis, so that none gets slower by what others have left.
pub async fn measure(plan: &Plan, servers: &[Server], redis: &mut RedisServer) -> Result<Vec<Cell>> {
    let mut cells = Vec::new();
    for &mode in &plan.modes {
        for &connections in &plan.connections {
            cells.push(Cell { mode, connections, measured: vec![Vec::new(); servers.len()] });
        }
    }
    for round in 0..plan.rounds {
        eprint!("round {} of {}:", round + 1, plan.rounds);
        let running = servers.iter().map(|server| Running::start(server, &redis.url())).collect::<Result<Vec<_>>>()?;
        for (server, running) in servers.iter().zip(&running) {
            let tag = format!("{}-{round}-start", server.name);
            Load::connect(running.target, Mode::New, 8, &tag).await?.send(Until::After(START)).await.context(tag)?;
        }
        for cell in &mut cells {
            eprint!(" {} {}", cell.mode, cell.connections);
            for turn in turns(servers.len(), round) {
                let tag = format!("{}-{round}-{}-{}", servers[turn].name, cell.mode, cell.connections);
                let measured = once(plan, cell, &running[turn], redis, &tag).await.context(tag)?;
                cell.measured[turn].push(measured);
            }
        }
        eprintln!();
        drop(running);
        redis.flush().await?;
    }
    Ok(cells)
}

/// The order of a round: each server is the first and the last as often, and comes after either neighbour.
fn turns(servers: usize, round: usize) -> Vec<usize> {
    let mut turns: Vec<usize> = (0..servers).map(|turn| (turn + round / 2) % servers).collect();
    if round % 2 == 1 {
        turns.reverse();
    }
    turns
}

async fn once(plan: &Plan, cell: &Cell, server: &Running, redis: &RedisServer, tag: &str) -> Result<Measured> {
    let mut load = Load::connect(server.target, cell.mode, cell.connections, tag).await?;
    load.send(Until::After(WARM_UP)).await?;
    let (server_before, redis_before) = (server.cpu()?, redis.cpu()?);
    let answered = load.send(Until::After(plan.lasts)).await?;
    let (server_after, redis_after) = (server.cpu()?, redis.cpu()?);
    Ok(Measured {
        per_second: answered.requests() / answered.seconds,
        p50: answered.percentile(0.5)?,
        p99: answered.percentile(0.99)?,
        server_cpu: server_after.since(&server_before) / answered.requests(),
        redis_cpu: redis_after.since(&redis_before) / answered.requests(),
    })
}
