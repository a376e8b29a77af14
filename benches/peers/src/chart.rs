//! The requests per second as bars. The colours are legible on white and on black, since an image does not know which it is on.

use std::fmt::Write as _;

use crate::report::Report;
use crate::rounds::Cell;
use crate::servers::Role;
use crate::stats::{Quartiles, quartiles};

const WIDTH: usize = 720;
const LEFT: usize = 180;
/// How wide the bar of bare axum would be.
const WHOLE: f64 = 460.0;
const BAR: usize = 16;
const STEP: usize = 22;
const HEAD: usize = 34;
const TEXT: &str = "#7a828c";

impl Report<'_> {
    /// One group of bars for each mode, all with as many connections.
    pub fn svg(&self) -> String {
        let middle = self.plan.connections[self.plan.connections.len() / 2];
        let cells: Vec<&Cell> = self.cells.iter().filter(|cell| cell.connections == middle).collect();
        // Bare axum is what the others are measured by.
        let servers: Vec<usize> =
            (0..self.servers.len()).filter(|&server| self.servers[server].role != Role::Bare).collect();
        let group = HEAD + servers.len() * STEP;
        let mut svg = format!(
            r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {}" width="{WIDTH}" font-family="system-ui, sans-serif" font-size="13" fill="{TEXT}">"#,
            cells.len() * group + 8
        );
        svg.push('\n');
        for (number, cell) in cells.iter().enumerate() {
            let top = number * group;
            let title = format!(
                "{}, {middle} at once: requests per second as a ratio to bare axum, with quartiles",
                cell.mode.title()
            );
            let _ = writeln!(svg, r#"<text x="4" y="{}" font-weight="600">{title}</text>"#, top + 22);
            for (place, &server) in servers.iter().enumerate() {
                let ratio = quartiles(self.to_bare(cell, server));
                if !ratio.median.is_nan() {
                    let drawn = &self.servers[server];
                    bar(&mut svg, top + HEAD + place * STEP, drawn.title, colour(drawn.role), ratio);
                }
            }
        }
        svg.push_str("</svg>\n");
        svg
    }
}

fn colour(role: Role) -> &'static str {
    match role {
        Role::Bare | Role::Bound => "#9aa4af",
        Role::Ours => "#2f81f7",
        Role::Rival { .. } => "#d08a2e",
    }
}

fn bar(svg: &mut String, top: usize, title: &str, colour: &str, ratio: Quartiles) {
    let Quartiles { lower, median, upper } = ratio;
    let (text, middle) = (top + 13, top + BAR / 2);
    let at = |ratio: f64| LEFT as f64 + ratio * WHOLE;
    let _ = writeln!(
        svg,
        r#"<text x="{}" y="{text}" text-anchor="end">{title}</text><rect x="{LEFT}" y="{top}" width="{:.1}" height="{BAR}" rx="2" fill="{colour}"/><path d="M{:.1} {middle}H{:.1}" stroke="{TEXT}" stroke-width="3"/><text x="{:.1}" y="{text}">{median:.2}</text>"#,
        LEFT - 8,
        median * WHOLE,
        at(lower),
        at(upper),
        at(upper) + 6.0,
    );
}
