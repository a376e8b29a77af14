//! Does harm to the app, to Redis and to what is between them, and counts what is lost and what is doubled.
//!
//! A sender delivers each event until it is told 2xx, and late once more. *Lost* is an event without an effect, *doubled*
//! is each effect of an event beyond its first. Each experiment runs twice: with the effect outside of any store, and with
//! the effect fenced by a row in the same transaction. `cargo test --test experiments` runs all and prints a table;
//! `cargo test --test experiments -- killed` those whose names contain that.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]
#![allow(unreachable_pub, reason = "nothing reaches a test")]
#![allow(clippy::print_stdout, reason = "it prints a table")]

#[path = "../common/mod.rs"]
mod common;

mod app;
mod apps;
mod clusters;
mod effects;
mod experiment;
mod network;
mod process;
mod sender;
mod sentinels;
mod servers;
mod table;
mod trial;

use std::env;
use std::process::ExitCode;

use tokio::runtime::Runtime;
use tokio::time::Instant;

use experiment::Experiment;
use table::Table;

/// The arguments of a test that are followed by a value.
const WITH_VALUE: [&str; 6] = ["--color", "--format", "--logfile", "--skip", "--test-threads", "-Z"];

fn main() -> ExitCode {
    let runtime = Runtime::new().unwrap();
    if let Some(setup) = process::setup() {
        runtime.block_on(process::serve(&setup));
        return ExitCode::SUCCESS;
    }
    let experiments = chosen(env::args().skip(1));
    if env::args().any(|arg| arg == "--list") {
        experiments.iter().for_each(|experiment| println!("{}: test", experiment.name));
        return ExitCode::SUCCESS;
    }
    runtime.block_on(run(&experiments))
}

/// The experiments whose names contain one of the arguments, or all.
fn chosen(mut args: impl Iterator<Item = String>) -> Vec<&'static Experiment> {
    let (mut wanted, mut exact, mut skipped, mut ignored) = (Vec::new(), false, Vec::new(), false);
    while let Some(arg) = args.next() {
        match &*arg {
            "--exact" => exact = true,
            "--ignored" => ignored = true,
            "--skip" => skipped.extend(args.next()),
            _ if WITH_VALUE.contains(&&*arg) => drop(args.next()),
            _ if arg.starts_with('-') => {}
            _ => wanted.push(arg),
        }
    }
    let is = |name: &str, word: &String| if exact { name == word } else { name.contains(&**word) };
    let is_chosen = |experiment: &&Experiment| {
        let named = |words: &[String]| words.iter().any(|word| is(experiment.name, word));
        !ignored && (wanted.is_empty() || named(&wanted)) && !named(&skipped)
    };
    let groups: [&[Experiment]; 5] = [
        &apps::EXPERIMENTS,
        &servers::EXPERIMENTS,
        &network::EXPERIMENTS,
        &clusters::EXPERIMENTS,
        &sentinels::EXPERIMENTS,
    ];
    groups.into_iter().flatten().filter(is_chosen).collect()
}

async fn run(experiments: &[&'static Experiment]) -> ExitCode {
    let started = Instant::now();
    let (mut rows, mut failed) = (Vec::new(), 0);
    println!("\nrunning {} experiments", experiments.len());
    for experiment in experiments {
        let started = Instant::now();
        let row = experiment.run().await;
        let fault = row.as_ref().map_or_else(|fault| fault, |row| &row.faults);
        if fault.is_empty() {
            println!("test {} ... ok, {:.1} s", experiment.name, started.elapsed().as_secs_f64());
        } else {
            println!("test {} ... FAILED\n{fault}", experiment.name);
            failed += 1;
        }
        rows.extend(row);
    }
    if !rows.is_empty() {
        println!("\n{}", Table(&rows));
    }
    let outcome = if failed == 0 { "ok" } else { "FAILED" };
    let took = started.elapsed().as_secs_f64();
    let passed = experiments.len() - failed;
    println!("test result: {outcome}. {passed} passed; {failed} failed; finished in {took:.1} s\n");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
