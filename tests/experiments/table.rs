//! What came of the experiments, as a table.

use std::fmt;
use std::time::Duration;

use crate::experiment::Row;

pub struct Table<'a>(pub &'a [Row]);

const HEAD: [&str; 8] =
    ["experiment", "requests", "runs", "lost", "doubled outside", "doubled fenced", "recovery", "refusal"];

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows: Vec<[String; 8]> = self.0.iter().map(cells).collect();
        let widths: Vec<usize> = (0..HEAD.len())
            .map(|column| rows.iter().map(|row| row[column].len()).chain([HEAD[column].len()]).max().unwrap_or(0))
            .collect();
        let line = |f: &mut fmt::Formatter<'_>, row: &[String]| {
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                match column {
                    0 => write!(f, "{cell:width$}")?,
                    _ => write!(f, " | {cell:>width$}")?,
                }
            }
            writeln!(f)
        };
        line(f, &HEAD.map(str::to_owned))?;
        let rule: Vec<String> = widths.iter().map(|width| "-".repeat(*width)).collect();
        writeln!(f, "{}", rule.join("-|-"))?;
        rows.iter().try_for_each(|row| line(f, row))?;
        writeln!(
            f,
            "Requests, runs and lost: of both places together. Recovery: from the end of the fault to the first 2xx."
        )?;
        writeln!(f, "Refusal: the median while there is no store. Of recovery and refusal, the longer of both places.")
    }
}

fn cells(row: &Row) -> [String; 8] {
    let (outside, fenced) = (&row.outside, &row.fenced);
    [
        row.name.replace('_', " "),
        (outside.requests + fenced.requests).to_string(),
        (outside.runs + fenced.runs).to_string(),
        (outside.lost.len() + fenced.lost.len()).to_string(),
        outside.doubled.to_string(),
        fenced.doubled.to_string(),
        shown(outside.recovery.max(fenced.recovery)),
        shown(outside.refusal.max(fenced.refusal)),
    ]
}

fn shown(took: Option<Duration>) -> String {
    match took {
        None => "-".to_owned(),
        Some(took) if took < Duration::from_millis(10) => format!("{:.2} ms", took.as_secs_f64() * 1e3),
        Some(took) => format!("{} ms", took.as_millis()),
    }
}
