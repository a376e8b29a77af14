//! Metrics as Prometheus reads them.

use std::collections::BTreeMap;

use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusRecorder};

/// What a page of metrics says: each series by its name, with its labels in order.
#[derive(Clone, Debug, PartialEq)]
pub struct Metrics(BTreeMap<String, f64>);

/// A recorder whose durations are histograms.
pub fn recorder() -> PrometheusRecorder {
    PrometheusBuilder::new().set_buckets(&[0.1, 1.0]).unwrap().build_recorder()
}

impl Metrics {
    pub fn parse(page: &str) -> Self {
        let samples = page.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
        Self(
            samples
                .map(|sample| sample.rsplit_once(' ').unwrap())
                .map(|(name, value)| (sorted(name), value.parse().unwrap()))
                .collect(),
        )
    }

    /// A series that is not there counts as zero.
    pub fn get(&self, series: &str) -> f64 {
        self.0.get(&sorted(series)).copied().unwrap_or(0.0)
    }

    pub fn has(&self, series: &str) -> bool {
        self.0.contains_key(&sorted(series))
    }

    /// All series of a name.
    pub fn of<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (&'a str, f64)> {
        let mine =
            move |series: &str| series.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('{'));
        self.0.iter().filter(move |(series, _)| mine(series)).map(|(series, value)| (series.as_str(), *value))
    }

    /// The sum of all series of a name.
    pub fn sum(&self, name: &str) -> f64 {
        self.of(name).map(|(_, value)| value).sum()
    }
}

/// No label's value in these tests holds a comma.
fn sorted(series: &str) -> String {
    let Some((name, labels)) = series.split_once('{') else { return series.to_owned() };
    let mut labels: Vec<_> = labels.trim_end_matches('}').split(',').collect();
    labels.sort_unstable();
    format!("{name}{{{}}}", labels.join(","))
}
