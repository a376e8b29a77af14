//! A connection, and what is known of its health.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use redis::{RedisError, RedisResult};
use tokio::time::Instant;

use super::failure::{is_about_topology, is_from_replica, is_reply, is_worth_leaving};
use super::link::Link;
use crate::sync::{Mutex, lock};

/// How many calls in a row go unanswered, and for how long, before a connection is not trusted any more. Both, because
/// callers differ in their deadlines, and because one whose own client has left stops waiting at once.
const MAX_SILENT: u32 = 2;
const MAX_SILENCE: Duration = Duration::from_millis(200);

/// A connection and what is known of its health. Clones are one connection.
#[derive(Clone)]
pub(super) struct Connection(Arc<Inner>);

struct Inner {
    link: Arc<dyn Link>,
    health: Mutex<Health>,
}

struct Health {
    /// Whether one call that fails breaks it for all.
    is_whole: bool,
    broken: bool,
    /// By failure domain: one node of a cluster may be silent while the others answer.
    domains: Vec<Domain>,
}

#[derive(Clone, Copy, Default)]
struct Domain {
    last_answer: Option<Instant>,
    /// How many calls in a row have got no answer, for how long, and until when. Calls that wait together wait once.
    silent: u32,
    silent_for: Duration,
    silent_until: Option<Instant>,
}

#[derive(Clone, Copy, Eq, PartialEq)]
pub(super) enum Verdict {
    Broken,
    Good,
    /// It does not answer about these keys.
    Silent,
}

/// A call under way. Dropped without an answer, it counts as silence.
struct Call<'a> {
    connection: &'a Connection,
    domain: usize,
    sent: Instant,
    answered: bool,
    /// There is nothing to wait for.
    failed: bool,
}

// === impl Connection ===

impl Connection {
    pub(super) fn new(link: Arc<dyn Link>, is_whole: bool) -> Self {
        let health = Mutex::new(Health { is_whole, broken: false, domains: Vec::new() });
        Self(Arc::new(Inner { link, health }))
    }

    pub(super) fn link(&self) -> &dyn Link {
        &*self.0.link
    }

    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Breaks it for all, unless it repairs itself.
    pub(super) fn fail(&self) {
        lock(&self.0.health).fail();
    }

    pub(super) fn is_broken(&self) -> bool {
        lock(&self.0.health).broken
    }

    pub(super) fn verdict(&self, domain: usize) -> Verdict {
        let health = lock(&self.0.health);
        let is_silent = |domain: &Domain| domain.silent >= MAX_SILENT && domain.silent_for >= MAX_SILENCE;
        match health.broken {
            true => Verdict::Broken,
            false if health.domains.get(domain).is_some_and(is_silent) => Verdict::Silent,
            false => Verdict::Good,
        }
    }

    /// Whether the last call about a domain was answered.
    pub(super) fn answers(&self, domain: usize) -> bool {
        let health = lock(&self.0.health);
        health.domains.get(domain).is_some_and(|domain| domain.silent == 0 && domain.last_answer.is_some())
    }

    pub(super) async fn call<T>(&self, domain: usize, call: BoxFuture<'_, RedisResult<T>>) -> RedisResult<T> {
        let sent = Instant::now();
        let mut under_way = Call { connection: self, domain, sent, answered: false, failed: false };
        let result = call.await;
        match &result {
            Err(error) if is_reply(error) => under_way.refused(error),
            Err(error) if error.is_timeout() => {}
            Err(_) => {
                under_way.failed = true;
                lock(&self.0.health).fail();
            }
            Ok(_) => under_way.answered(),
        }
        result
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").finish_non_exhaustive()
    }
}

// === impl Health ===

impl Health {
    fn fail(&mut self) {
        self.broken |= self.is_whole;
    }

    fn domain(&mut self, domain: usize) -> &mut Domain {
        if self.domains.len() <= domain {
            self.domains.resize(domain + 1, Domain::default());
        }
        &mut self.domains[domain]
    }
}

// === impl Call ===

impl Call<'_> {
    fn answered(&mut self) {
        self.answered = true;
        *lock(&self.connection.0.health).domain(self.domain) =
            Domain { last_answer: Some(Instant::now()), ..Domain::default() };
    }

    /// An error is an answer. Of a cluster one that says that another node has the key is none, since its client has
    /// followed the topology as far as it knows it; nor is that of a master without replicas.
    fn refused(&mut self, error: &RedisError) {
        let is_whole = {
            let mut health = lock(&self.connection.0.health);
            if is_from_replica(error) {
                health.fail();
            }
            health.is_whole
        };
        self.failed = is_worth_leaving(error);
        if is_whole || !(self.failed || is_about_topology(error)) {
            self.answered();
        }
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        if !self.answered {
            let now = Instant::now();
            let mut health = lock(&self.connection.0.health);
            let domain = health.domain(self.domain);
            if domain.last_answer.is_none_or(|answer| answer < self.sent) {
                let since = domain.silent_until.map_or(self.sent, |until| until.max(self.sent));
                domain.silent += 1;
                domain.silent_for += if self.failed { MAX_SILENCE } else { now - since };
                domain.silent_until = Some(now);
            }
        }
    }
}
