//! What the layer costs, against bare axum, bounds written by hand and, with the feature `rivals`, other crates.
//!
//! `Cargo.toml` says how to run it, `report.rs` how it measures.

mod chart;
mod costs;
mod load;
mod machine;
mod process;
mod redis_server;
mod report;
#[cfg(feature = "rivals")]
mod rivals;
mod rounds;
mod running;
mod servers;
mod stats;

use std::env;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::load::Mode;
use crate::machine::Machine;
use crate::redis_server::RedisServer;
use crate::report::Report;
use crate::rounds::Plan;
use crate::servers::{Place, Server};

const USAGE: &str = "\
  --rounds N            how often each server is measured in each mode (15)
  --millis N            how long, each time (400)
  --modes A,B           of new, duplicate, half (all)
  --connections N,M     how many at once (1,32,128)
  --only A,B            servers (all): bare, floor, fenced, redis, …
  --redis-server PATH   the program to start (redis-server)
  --no-callgrind        counts no instructions, which takes minutes";

struct Options {
    plan: Plan,
    only: Vec<String>,
    redis_server: String,
    callgrind: bool,
}

impl Options {
    fn parse(mut args: impl Iterator<Item = String>) -> Result<Self> {
        let mut options = Self {
            plan: Plan {
                modes: Mode::ALL.to_vec(),
                connections: vec![1, 32, 128],
                rounds: 15,
                lasts: Duration::from_millis(400),
            },
            only: Vec::new(),
            redis_server: "redis-server".to_owned(),
            callgrind: true,
        };
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
            match &*arg {
                "--rounds" => options.plan.rounds = value()?.parse()?,
                "--millis" => options.plan.lasts = Duration::from_millis(value()?.parse()?),
                "--modes" => options.plan.modes = list(&value()?)?,
                "--connections" => options.plan.connections = list(&value()?)?,
                "--only" => options.only = list(&value()?)?,
                "--redis-server" => options.redis_server = value()?,
                "--no-callgrind" => options.callgrind = false,
                "--help" => bail!("the options are\n{USAGE}"),
                _ => bail!("no option is {arg}; there are\n{USAGE}"),
            }
        }
        Ok(options)
    }

    /// Whether all there is is measured.
    fn is_whole(&self) -> bool {
        self.only.is_empty() && self.callgrind && self.plan.modes.len() == Mode::ALL.len() && self.plan.rounds >= 15
    }
}

fn list<T>(values: &str) -> Result<Vec<T>>
where
    T: FromStr,
    anyhow::Error: From<T::Err>,
{
    Ok(values.split(',').map(T::from_str).collect::<Result<_, _>>()?)
}

/// The servers that do what they are for, and why the others are left out. Ours and the bounds have to.
async fn able(servers: Vec<Server>, redis: &RedisServer) -> Result<(Vec<Server>, Vec<(String, String)>)> {
    let (mut able, mut left_out) = (Vec::new(), Vec::new());
    for server in servers {
        match running::check(&server, &redis.url()).await {
            Ok(()) => able.push(server),
            Err(error) if server.is_rival() => left_out.push((server.title.to_owned(), format!("{error:#}"))),
            Err(error) => return Err(error.context(server.name)),
        }
    }
    Ok((able, left_out))
}

async fn compare(options: Options) -> Result<()> {
    // What is measured in part is printed, and does not take the place of the figures beside this crate.
    let is_whole = options.is_whole();
    let Options { plan, only, redis_server, callgrind } = options;
    let machine = Machine::look(&redis_server)?;
    let mut redis = RedisServer::start(&redis_server).await?;
    let (servers, left_out) = able(servers::named(&only)?, &redis).await?;
    let cells = rounds::measure(&plan, &servers, &mut redis).await?;
    let costs = costs::count(&servers, &mut redis, callgrind && machine::has("valgrind")).await?;
    let report =
        Report { machine: &machine, plan: &plan, servers: &servers, cells: &cells, costs: &costs, left_out: &left_out };
    let (here, markdown) = (Path::new(env!("CARGO_MANIFEST_DIR")), report.markdown());
    if is_whole {
        fs::write(here.join("RESULTS.md"), &markdown)?;
        fs::write(here.join("RESULTS.svg"), report.svg())?;
    }
    Ok(std::io::stdout().write_all(markdown.as_bytes())?)
}

async fn serve(args: &[String]) -> Result<()> {
    let [name, redis, dir] = args else { bail!("a server needs a name, a URL and a directory") };
    let server = servers::all().into_iter().find(|server| server.name == name);
    let server = server.with_context(|| format!("no server is named {name}"))?;
    server.serve(Place { redis: redis.clone(), dir: dir.into() }).await
}

#[tokio::main]
async fn main() -> Result<()> {
    let args: Vec<String> = env::args().skip(1).collect();
    match args.first().map(String::as_str) {
        Some(process::BOUND) => match process::become_bound(&args[1..])? {},
        Some(running::SERVE) => serve(&args[1..]).await,
        _ => {
            let options = Options::parse(args.into_iter())?;
            ensure!(options.plan.rounds > 0 && !options.plan.lasts.is_zero(), "nothing to measure");
            compare(options).await
        }
    }
}
