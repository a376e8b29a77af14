//! A look at the server: whether it will keep what it is given.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use redis::{ErrorKind, RedisError, RedisResult, Value};
use tokio::time::timeout;

use super::failure::comes_before_any_effect;
use super::link::Link;
use crate::sync::{Mutex, lock};
use crate::telemetry;

/// How long the look may take.
const TIMEOUT: Duration = Duration::from_secs(1);

/// The oldest version that this crate is tried on.
const OLDEST: (u32, u32) = (6, 2);

/// Looks at every server that is connected to, and says what it finds once.
#[derive(Debug, Default)]
pub(super) struct Inspector {
    is_strict: bool,
    said: Mutex<BTreeSet<Finding>>,
}

/// Settings, and where they go.
const SETTINGS: [(&str, Field); 4] = [
    ("maxmemory", |server| &mut server.maxmemory),
    ("maxmemory-policy", |server| &mut server.policy),
    ("appendonly", |server| &mut server.appends),
    ("save", |server| &mut server.snapshots),
];

type Field = fn(&mut Server) -> &mut Option<String>;

/// What can go wrong with what is kept there.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Finding {
    /// By this policy.
    Evicts(String),
    Old(String),
    /// Neither by snapshots nor by a log.
    NotPersistent,
    /// Not by a log, and at best by snapshots.
    SnapshotsOnly,
    /// The user may not ask, or the server does not tell.
    Unknown(&'static str),
}

/// What a server says of itself.
#[derive(Debug, Default)]
struct Server {
    version: Option<String>,
    maxmemory: Option<String>,
    policy: Option<String>,
    appends: Option<String>,
    snapshots: Option<String>,
}

// === impl Inspector ===

impl Inspector {
    pub(super) fn strict() -> Self {
        Self { is_strict: true, ..Self::default() }
    }

    pub(super) const fn is_strict(&self) -> bool {
        self.is_strict
    }

    /// Looks at what a connection leads to, and warns of what can go wrong.
    ///
    /// # Errors
    ///
    /// What has been found, where it loses what is kept, for whoever is strict about that; or that the server did not answer.
    pub(super) async fn look(&self, link: &dyn Link) -> Result<(), RedisError> {
        let too_long = |_| Err(RedisError::from((ErrorKind::Io, "the server could not be looked at in time")));
        let servers = timeout(TIMEOUT, servers(link)).await.unwrap_or_else(too_long)?;
        let findings: BTreeSet<Finding> = servers.values().flat_map(Server::findings).collect();
        let fresh: Vec<_> = {
            let mut said = lock(&self.said);
            let fresh = findings.difference(&said).cloned().collect();
            said.clone_from(&findings);
            fresh
        };
        for finding in &fresh {
            telemetry::server(finding.is_known(), &finding.text());
        }
        match findings.into_iter().find(Finding::loses) {
            Some(finding) => Err((ErrorKind::InvalidClientConfig, "the server is not safe", finding.text()).into()),
            None => Ok(()),
        }
    }
}

// === impl Server ===

/// One, or all masters of a cluster, by their addresses.
async fn servers(link: &dyn Link) -> Result<BTreeMap<String, Server>, RedisError> {
    let info = allowed(link.ask_all(&redis::cmd("INFO")).await)?.unwrap_or_default();
    let mut servers: BTreeMap<_, _> = info.into_iter().map(|(node, info)| (node, Server::of(&text(info)))).collect();
    // What `INFO` does not tell, or not this user.
    for (name, field) in SETTINGS {
        if !servers.is_empty() && servers.values_mut().all(|server| field(server).is_some()) {
            continue;
        }
        let mut get = redis::cmd("CONFIG");
        get.arg("GET").arg(name);
        for (node, answer) in allowed(link.ask_all(&get).await)?.unwrap_or_default() {
            let there = field(servers.entry(node).or_default());
            if there.is_none() {
                *there = setting(answer);
            }
        }
    }
    if servers.is_empty() {
        servers.insert(String::new(), Server::default());
    }
    Ok(servers)
}

/// Nothing where the user may not ask.
fn allowed<T>(answer: RedisResult<T>) -> Result<Option<T>, RedisError> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(error) if comes_before_any_effect(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

impl Server {
    fn of(info: &str) -> Self {
        let field = |name: &str| {
            let value = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            value.map(|value| value.trim().to_owned())
        };
        Self {
            // Valkey also names the version of Redis that it is compatible with.
            version: field("redis_version"),
            maxmemory: field("maxmemory"),
            policy: field("maxmemory_policy"),
            appends: field("aof_enabled"),
            snapshots: None,
        }
    }

    fn findings(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        let limit = self.maxmemory.as_deref();
        match self.policy.as_deref() {
            Some("noeviction") => {}
            // Without a limit there is nothing to evict for.
            Some(_) if limit == Some("0") => {}
            Some(policy) => findings.push(Finding::Evicts(policy.to_owned())),
            None => findings.push(Finding::Unknown("whether it evicts keys")),
        }
        match (self.appends.as_deref(), self.snapshots.as_deref()) {
            (Some("1" | "yes"), _) => {}
            (Some(_), Some("")) => findings.push(Finding::NotPersistent),
            // Whether there are any or not.
            (Some(_), _) => findings.push(Finding::SnapshotsOnly),
            (None, _) => findings.push(Finding::Unknown("whether it persists")),
        }
        match &self.version {
            Some(version) if is_old(version) => findings.push(Finding::Old(version.clone())),
            Some(_) => {}
            None => findings.push(Finding::Unknown("its version")),
        }
        findings
    }
}

/// The value in an answer of `CONFIG GET`.
fn setting(answer: Value) -> Option<String> {
    match answer {
        Value::Array(pair) => pair.into_iter().nth(1).map(text),
        Value::Map(pairs) => pairs.into_iter().next().map(|(_, value)| text(value)),
        _ => None,
    }
}

fn text(value: Value) -> String {
    match value {
        Value::BulkString(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Value::SimpleString(text) | Value::VerbatimString { text, .. } => text,
        _ => String::new(),
    }
}

fn is_old(version: &str) -> bool {
    let mut numbers = version.split('.').map_while(|number| number.parse().ok());
    numbers.next().zip(numbers.next()).is_some_and(|version| version < OLDEST)
}

// === impl Finding ===

impl Finding {
    /// Whether an event that has run may be forgotten by it.
    const fn loses(&self) -> bool {
        matches!(self, Self::Evicts(_) | Self::NotPersistent | Self::SnapshotsOnly)
    }

    const fn is_known(&self) -> bool {
        !matches!(self, Self::Unknown(_))
    }

    fn text(&self) -> String {
        match self {
            Self::Evicts(policy) => {
                format!(
                    "its maxmemory-policy is {policy}: keys may be evicted, and their events run again; set noeviction"
                )
            }
            Self::Old(version) => format!("its version is {version}: 6.2 and later are supported"),
            Self::NotPersistent => {
                "it persists nothing: what it knew is lost with a restart, and events run again; set appendonly yes"
                    .to_owned()
            }
            Self::SnapshotsOnly => {
                "it persists by snapshots at best: what it learned since the last one is lost with a crash, and events run \
                 again; set appendonly yes"
                    .to_owned()
            }
            Self::Unknown(what) => format!("it does not say {what}; `+info`, or `+config|get`, lets it"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(policy: &str, maxmemory: &str, appends: &str, snapshots: &str) -> Server {
        let some = |text: &str| (text != "?").then(|| text.to_owned());
        Server {
            version: some("7.0.15"),
            maxmemory: some(maxmemory),
            policy: some(policy),
            appends: some(appends),
            snapshots: some(snapshots),
        }
    }

    #[test]
    fn what_loses_keys_is_found() {
        let evicts = |policy: &str| vec![Finding::Evicts(policy.to_owned())];
        let cases = [
            (server("noeviction", "100", "1", ""), vec![]),
            (server("volatile-lru", "0", "yes", ""), vec![]),
            (server("volatile-lru", "100", "1", ""), evicts("volatile-lru")),
            (server("allkeys-lfu", "?", "1", "?"), evicts("allkeys-lfu")),
            (server("noeviction", "0", "0", "3600 1"), vec![Finding::SnapshotsOnly]),
            (server("noeviction", "0", "1", "3600 1"), vec![]),
            (server("noeviction", "0", "0", ""), vec![Finding::NotPersistent]),
            (server("noeviction", "0", "0", "?"), vec![Finding::SnapshotsOnly]),
            (server("noeviction", "0", "?", "3600 1"), vec![Finding::Unknown("whether it persists")]),
            (server("?", "?", "1", ""), vec![Finding::Unknown("whether it evicts keys")]),
        ];
        for (server, findings) in cases {
            assert_eq!(server.findings(), findings, "{server:?}");
        }
        assert_eq!(Server::default().findings().len(), 3);
    }

    #[test]
    fn versions_are_read_as_numbers() {
        assert!(is_old("6.0.16") && is_old("5.0.14"));
        assert!(!is_old("6.2.14") && !is_old("10.0.0") && !is_old("7.2.4") && !is_old("unknown"));
    }
}
