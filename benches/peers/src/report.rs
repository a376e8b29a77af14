//! The figures as Markdown.

use std::fmt::Write as _;

use crate::costs::{Costs, Counted};
use crate::machine::Machine;
use crate::rounds::{Cell, Measured, Plan};
use crate::servers::Server;
use crate::stats::{median, quartiles};

pub struct Report<'a> {
    pub machine: &'a Machine,
    pub plan: &'a Plan,
    pub servers: &'a [Server],
    pub cells: &'a [Cell],
    pub costs: &'a [Costs],
    /// Servers without figures, with a reason each.
    pub left_out: &'a [(String, String)],
}

const METHOD: &str = "\
`bare axum` parses an order of 200 bytes and answers 201 with an invoice of 88; all others do this behind a layer. `floor` \
and `fenced floor` are bounds and no products: written by hand, a `SET NX GET PX` per request and a second command with the \
body of the response, plain or in a script that compares and sets; no headers, no fingerprint, nobody who waits. `ours` is \
`IdempotencyLayer::api` as it is by default.

Server, Redis and load generator are processes of one machine and share its cores. In each round every server is measured \
once in each mode, in an order that rotates and reverses; servers start anew and Redis is emptied between rounds. Redis \
does not write to disk; SQLite does. A ratio is the median of the ratios within the rounds, in parentheses their \
quartiles. p50 and p99 are latencies as a client sees them, as ratios to bare axum's; CPU is microseconds per request, of \
the server and of Redis.";

const CELL_HEAD: &str = "\
| | requests/s | to bare | to floor | to fenced | p50 to bare | p99 to bare | CPU, server | CPU, Redis |
|---|---|---|---|---|---|---|---|---|";

const COSTS_HEAD: &str = "\
| | commands, first | commands, duplicate | bytes in Redis | instructions, first | instructions, duplicate |
|---|---|---|---|---|---|";

impl Report<'_> {
    pub fn markdown(&self) -> String {
        let mut out = String::from("# What it costs\n\n");
        let Machine { cpu, cores, kernel, rustc, redis } = self.machine;
        let (rounds, millis) = (self.plan.rounds, self.plan.lasts.as_millis());
        line(
            &mut out,
            &format!("{cpu}, {cores} cores, Linux {kernel}, {rustc}, {redis}; {rounds} rounds of {millis} ms.\n"),
        );
        line(&mut out, &format!("{METHOD}\n"));
        line(&mut out, "![Requests per second, as a ratio to bare axum](RESULTS.svg)\n");
        for cell in self.cells {
            self.cell(&mut out, cell);
        }
        self.costs(&mut out);
        if !self.left_out.is_empty() {
            line(&mut out, "\n## Left out\n");
            for (title, reason) in self.left_out {
                line(&mut out, &format!("- {title}: {reason}"));
            }
        }
        out
    }

    fn cell(&self, out: &mut String, cell: &Cell) {
        let Cell { mode, connections, measured } = cell;
        let connections =
            if *connections == 1 { "1 connection".to_owned() } else { format!("{connections} connections") };
        line(out, &format!("## {}, {connections}\n\n{CELL_HEAD}", capitalised(mode.title())));
        for (server, rounds) in self.servers.iter().zip(measured) {
            let of = |figure: fn(&Measured) -> f64| median(rounds.iter().map(figure));
            let to = |name: &str, figure| number(median(self.ratios(cell, rounds, name, figure)), 2);
            let to_bare = quartiles(self.ratios(cell, rounds, "bare", |measured| measured.per_second));
            let to_bare = if to_bare.median.is_nan() {
                "–".to_owned()
            } else {
                format!("{:.2} ({:.2}–{:.2})", to_bare.median, to_bare.lower, to_bare.upper)
            };
            let columns = [
                server.title.to_owned(),
                number(of(|measured| measured.per_second), 0),
                to_bare,
                to("floor", |measured| measured.per_second),
                to("fenced", |measured| measured.per_second),
                to("bare", |measured| measured.p50),
                to("bare", |measured| measured.p99),
                number(of(|measured| measured.server_cpu), 1),
                number(of(|measured| measured.redis_cpu), 1),
            ];
            row(out, &columns);
        }
        out.push('\n');
    }

    /// One for each round; none if the other server is not measured.
    fn ratios(&self, cell: &Cell, rounds: &[Measured], to: &str, figure: fn(&Measured) -> f64) -> Vec<f64> {
        let other = self.servers.iter().zip(&cell.measured).find(|(server, _)| server.name == to);
        let Some((_, other)) = other else { return Vec::new() };
        rounds.iter().zip(other).map(|(mine, other)| figure(mine) / figure(other)).collect()
    }

    /// The ratios of a server's requests per second to bare axum's.
    pub fn to_bare(&self, cell: &Cell, server: usize) -> Vec<f64> {
        self.ratios(cell, &cell.measured[server], "bare", |measured| measured.per_second)
    }

    fn costs(&self, out: &mut String) {
        line(
            out,
            "## Of one request\n\nCommands that are sent to Redis, and after a plus those that scripts run there; bytes that a \
             first delivery leaves in Redis, by `MEMORY USAGE`; instructions of the server, by callgrind.\n",
        );
        line(out, COSTS_HEAD);
        for (server, costs) in self.servers.iter().zip(self.costs) {
            let Costs { first, duplicate, bytes } = costs;
            let bytes = if *bytes == 0.0 { "–".to_owned() } else { number(*bytes, 0) };
            let columns = [
                server.title.to_owned(),
                commands(first),
                commands(duplicate),
                bytes,
                instructions(first),
                instructions(duplicate),
            ];
            row(out, &columns);
        }
    }
}

fn commands(counted: &Counted) -> String {
    let sent = format!("{:.2}", counted.sent);
    if counted.in_scripts == 0.0 { sent } else { format!("{sent} + {:.2}", counted.in_scripts) }
}

fn instructions(counted: &Counted) -> String {
    counted.instructions.map_or("–".to_owned(), |instructions| number(instructions, 0))
}

fn number(value: f64, digits: usize) -> String {
    if value.is_nan() { "–".to_owned() } else { format!("{value:.digits$}") }
}

fn capitalised(text: &str) -> String {
    let (first, rest) = text.split_at(1);
    first.to_uppercase() + rest
}

fn row(out: &mut String, columns: &[String]) {
    line(out, &format!("| {} |", columns.join(" | ")));
}

fn line(out: &mut String, text: &str) {
    // A string takes everything.
    let _ = writeln!(out, "{text}");
}
