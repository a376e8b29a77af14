//! What the layer costs in the process, over a service that does nothing and the memory store: time and allocations.
//!
//! `cargo bench --bench overhead` lets criterion judge each case by itself, against the last time, and then prints a table for
//! which the cases take turns: there each round's ratio to the bare service, and to what of the case cannot be avoided, is taken within
//! the round, since two rounds on a shared machine differ by more than what is looked for. `-- replay` measures those whose names contain
//! that, `-- --quick` asks criterion for less; the table is printed all the same.
//!
//! All runs on one thread. The allocator counts while the clock runs, which takes 20 to 50 ns for each allocation that is made and
//! freed: without that, the bare service takes half of what the table says, and a replay four fifths. Nothing subscribes to
//! `tracing`, and nothing records `metrics`.

#![allow(clippy::unwrap_used, reason = "a benchmark panics where it fails")]
#![allow(clippy::print_stdout, reason = "it measures")]
#![allow(unreachable_pub, reason = "nothing reaches a benchmark")]

mod cases;
mod cost;
mod payload;
mod work;

use std::collections::HashMap;
use std::time::Duration;

use criterion::Criterion;

use cases::{BARE, Case};

const ROUNDS: usize = 15;
const ROUND: Duration = Duration::from_millis(20);

/// One request of a round.
#[derive(Clone, Copy)]
struct Single {
    nanos: f64,
    allocations: f64,
    bytes: f64,
}

fn main() {
    let cases = cases::all();
    let mut criterion = Criterion::default()
        .without_plots()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(500))
        .configure_from_args();
    for Case { name, run, .. } in &cases {
        criterion.bench_function(name, |bencher| bencher.iter_custom(|count| run(count).time));
    }
    criterion.final_summary();
    print(&cases, &take_turns(&cases));
}

/// Each case in each round.
fn take_turns(cases: &[Case]) -> HashMap<&str, Vec<Single>> {
    let counts: Vec<u64> = cases.iter().map(fitting).collect();
    let mut singles: HashMap<&str, Vec<Single>> = HashMap::new();
    for _ in 0..ROUNDS {
        for (case, &count) in cases.iter().zip(&counts) {
            let cost = (case.run)(count);
            let of_one = |all: f64| all / count as f64;
            singles.entry(&case.name).or_default().push(Single {
                nanos: of_one(cost.time.as_nanos() as f64),
                allocations: of_one(cost.allocations as f64),
                bytes: of_one(cost.bytes as f64),
            });
        }
    }
    singles
}

/// How often a case is done in one round: crowds are not cut in half.
fn fitting(case: &Case) -> u64 {
    let probe = work::CROWD;
    let took = (case.run)(probe).time.as_secs_f64();
    let fit = (ROUND.as_secs_f64() / took * probe as f64) as u64;
    fit.clamp(1, 100_000).next_multiple_of(probe)
}

fn print(cases: &[Case], singles: &HashMap<&str, Vec<Single>>) {
    println!("\n| case | ns | × bare | × its part | allocations | bytes |\n|---|---|---|---|---|---|");
    for Case { name, part, .. } in cases {
        let of = |value: fn(&Single) -> f64| median(singles[&**name].iter().map(value));
        let times = |other: &str| {
            let pairs = singles[&**name].iter().zip(&singles[other]);
            median(pairs.map(|(this, other)| this.nanos / other.nanos))
        };
        let part = part.as_ref().map_or_else(String::new, |part| format!("{:.2} of {part}", times(part)));
        let (nanos, allocations, bytes) = (of(|s| s.nanos), of(|s| s.allocations), of(|s| s.bytes));
        println!("| {name} | {nanos:.0} | {:.1} | {part} | {allocations:.1} | {bytes:.0} |", times(BARE));
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
