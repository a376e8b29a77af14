//! The store in Redis or Valkey, for services that run in more than one process.
//!
//! One binary string per key. A first delivery costs two commands, one to claim and one to complete, or three where its
//! outcome is larger than 16 KiB; a duplicate of a finished delivery costs one. Commands that are asked for at the same time leave
//! in one write, but not by TLS or in a cluster. Who holds a lease is decided by the server's clock alone.
//!
//! # What it is worth
//!
//! What the store promises ends where the server's memory ends. A server that forgets a key that ran lets its event run
//! again. It never acknowledges what has not run: in no row of this table is an event lost.
//!
//! | server | [`Durability`] | an event may run again after | and nothing of that by |
//! |---|---|---|---|
//! | any | any | a process that died between its effect and the record of it, or was paused for longer than its lease | a row in the transaction of the effect |
//! | any | any | an outage, a restart or a failover that an attempt runs through, where it lasts longer than the lease | a lease that is longer |
//! | any | any | a clock that jumps ahead by what is left of a lease, also from one server to the next in a failover; one that jumps back leaves a key running for longer | clocks that are slewed |
//! | any that evicts | any | the eviction of its key | `maxmemory-policy noeviction` |
//! | one node, no persistence | `Master` | a restart: all it knew | `appendonly yes` |
//! | one node, snapshots alone (the default of Redis) | `Master` | a crash: all it learned since the last one | `appendonly yes` |
//! | one node, `appendfsync everysec` | `Master` | a power cut: the last second | `appendfsync always` |
//! | one node, `appendfsync always` | `Master` | the loss of its disk | replicas |
//! | sentinels, or a cluster | `Master` | a failover: the writes that the replica had not got yet, and in a partition all that the old master took until it was told | `Replicated` |
//! | sentinels, or a cluster | `Replicated` | the promotion of another replica than those that had acknowledged; a restart of all at once | as many `replicas` as there are; `Synced` |
//! | sentinels, or a cluster | `Synced` | the promotion of another replica than those that had acknowledged | as many `replicas` as there are |
//!
//! `Replicated` and `Synced` pay for it with a round trip to the replicas, and with 503 while too few of them answer. No
//! setting makes Redis a consensus: where money depends on it, put the row into the transaction.
//!
//! # How to run it
//!
//! | setting | why |
//! |---|---|
//! | `maxmemory`, with `maxmemory-policy noeviction` | when it is full, new events are refused with 503 and their senders come again; what has run is still recorded and replayed |
//! | `appendonly yes` | a restart forgets nothing but the last second |
//! | `min-replicas-to-write 1`, `min-replicas-max-lag 10` | a master that is cut off from its replicas stops taking claims after ten seconds, not never |
//! | `cluster-node-timeout`, or `down-after-milliseconds` | until then a node that hangs is waited for; recovery takes up to 5 s more |
//!
//! An outcome of 90 bytes with its headers takes 264 bytes of the server's memory (`MEMORY USAGE`), one of 1 KiB about 1.4 KiB, an
//! event that failed 170, and each key 65 more in the server's tables: all of them for the layer's retention. A hundred events a second,
//! kept for three days, are 26 million keys and 8.6 GB.
//!
//! A second after it has connected, the store looks at the server and warns of one that can evict keys, or persists nothing, or
//! snapshots alone; [`strict`](RedisStore::strict) refuses it. In a cluster it looks at every master.
//!
//! # When it fails
//!
//! A call that is not answered within [`store_timeout`](crate::Ledger::store_timeout) is a 503, and so is a server that is
//! down. After [three](crate::Ledger::break_after) in a row requests are refused at once, but for one now and then that tries
//! it; traffic is back within a second of the server. A connection is made anew when it is cut, when two calls in a row got no
//! answer on it, and when it leads to a replica or to a master that its replicas have left. In a cluster calls are counted for
//! each range of 256 slots by itself, and the keys of a node that is silent get a connection of their own, so that the other
//! nodes go on serving theirs.
//!
//! # TLS
//!
//! A `rediss://` URL needs the feature `redis-tls`. It is rustls, and trusts the certificates that the system trusts, or those
//! in the file that the environment variable `SSL_CERT_FILE` names. Certificates of the program's own, for the server or for
//! itself, come with [`from_factory`](RedisStore::from_factory). The server's has to name the host as it is connected to:
//! for nodes of a cluster and masters behind sentinels that is the address they announce, a number unless
//! `cluster-preferred-endpoint-type hostname`, or `sentinel resolve-hostnames yes` and `sentinel announce-hostnames yes`, say
//! otherwise.
//!
//! The program brings the cryptography, such as
//!
//! ```toml
//! rustls = { version = "0.23", default-features = false, features = ["ring", "std", "tls12"] }
//! ```
//!
//! With one provider among all the dependencies this is enough. Where there may be several, one is chosen before the first
//! request:
//!
//! ```
//! rustls::crypto::ring::default_provider().install_default().expect("nobody has chosen before");
//! ```
//!
//! Without, the server counts as down: requests are refused with 503, and the `cause` in the log names the `CryptoProvider`.
//!
//! Another TLS of the crate `redis`, `tokio-native-tls-comp`, can take the place of this feature. With both of them in one
//! program rustls trusts nothing but what a factory brings.
//!
//! # Rights
//!
//! Least rights for an ACL user, with the default prefix: `~idempotency:* &idempotency:* +set +get +pttl +getrange +exists
//! +pexpire +rename +unlink +eval +evalsha +publish +subscribe +unsubscribe`. For another database than 0 `+select`; in a
//! cluster `+ping +cluster|slots +spublish +ssubscribe +sunsubscribe` in place of the last three; behind sentinels `+role`; for
//! [`Durability`] `+wait` or `+waitaof`; for the look at the server `+info` and `+config|get`. Without the rights to the
//! channels, or on a server or through a proxy that knows no RESP3, duplicates that wait for another process look every 50 to
//! 375 ms instead of being woken.

mod answer;
mod coalesce;
mod connection;
mod durability;
mod failure;
mod health;
mod inspect;
mod layout;
mod link;
mod push;
mod script;
mod steps;
mod topology;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use redis::aio::ConnectionLike;
use redis::{RedisError, RedisResult};

use self::connection::Connector;
use self::durability::Confirmer;
pub use self::durability::Durability;
use self::inspect::Inspector;
use self::push::Push;
use self::topology::Topology;

const PREFIX: &str = "idempotency";

/// Claims and records in Redis (6.2 and later) or Valkey. Cheap to clone; clones share their connections: one, another
/// while somebody waits for other processes, and up to eight more with a [`Durability`]. In a cluster each of them is one to
/// every node.
#[derive(Clone, Debug)]
pub struct RedisStore {
    topology: Arc<Topology>,
    connector: Arc<Connector>,
    push: Arc<Push>,
    confirmer: Arc<Confirmer>,
    prefix: Arc<str>,
    /// The server is older than 7.0: it has no `SET` with both `NX` and `GET`, and its scripts have no flags.
    before_7: Arc<AtomicBool>,
}

/// The text is not the URL of a Redis server.
#[derive(Debug)]
pub struct InvalidUrl(RedisError);

impl RedisStore {
    /// A store at a URL such as `redis://user:password@host:6379/0` or `redis+unix:///run/redis.sock`.
    ///
    /// Nothing is connected before the first call: a server that is down at start refuses requests, not the start. A
    /// `rediss://` URL needs the feature `redis-tls`, and [a line in the program](self#tls).
    ///
    /// # Errors
    ///
    /// If `url` is not the URL of a Redis server, or asks for TLS without that feature.
    pub fn new(url: &str) -> Result<Self, InvalidUrl> {
        Topology::node(url).map(Self::at).map_err(InvalidUrl)
    }

    /// A store in a Redis Cluster, of which the URLs name some nodes; the others are found by them. User, password and TLS
    /// are the same for all, and with TLS each has a certificate for the [address it announces](self#tls).
    ///
    /// # Errors
    ///
    /// If one of them is not the URL of a Redis server or names a Unix socket, if they differ in user, password or TLS, or if
    /// there is none.
    pub fn cluster(urls: &[&str]) -> Result<Self, InvalidUrl> {
        Topology::cluster(urls).map(Self::at).map_err(InvalidUrl)
    }

    /// A store on the master that sentinels know of. `sentinels` are their URLs, with the user and password of the first for
    /// all of them. The host of `master` is the name that they know it by, and the rest of it is how to connect to it:
    /// `rediss://user:password@orders/0`. With TLS its certificate is for the [address that they announce](self#tls), not for
    /// that name.
    ///
    /// The user needs `+role`, beside the [rights](self) to the keys.
    ///
    /// # Errors
    ///
    /// If one of them is not a URL of that kind, if some sentinels are reached by TLS and others are not, or if there is none.
    pub fn sentinel(sentinels: &[&str], master: &str) -> Result<Self, InvalidUrl> {
        Topology::sentinel(sentinels, master).map(Self::at).map_err(InvalidUrl)
    }

    /// A store on the connections that a function of yours makes: to set certificates, or to fetch credentials. It is called
    /// for the first connection, and whenever one is lost or does not answer any more, and has to make a new one to one server
    /// each time: clones of one connection could not be replaced, and [`cluster`](Self::cluster) is for clusters. Each call may
    /// take 3 s. Duplicates that wait for another process look again every 50 to 375 ms, for it makes no connection that listens. A
    /// factory that panics has failed to connect.
    ///
    /// ```
    /// use tower_idempotency::RedisStore;
    ///
    /// let client = redis::Client::open("redis://localhost/")?;
    /// let store = RedisStore::from_factory(move || {
    ///     let client = client.clone();
    ///     async move { client.get_multiplexed_async_connection().await }
    /// });
    /// # Ok::<(), redis::RedisError>(())
    /// ```
    pub fn from_factory<F, C>(factory: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = RedisResult<C>> + Send + 'static,
        C: ConnectionLike + Clone + Send + Sync + 'static,
    {
        Self::at(Topology::custom(factory))
    }

    fn at(topology: Topology) -> Self {
        let topology = Arc::new(topology);
        Self {
            connector: Arc::new(Connector::new(Arc::clone(&topology)).inspected(Inspector::default())),
            push: Arc::new(Push::new(Arc::clone(&topology))),
            confirmer: Arc::new(Confirmer::new(Arc::clone(&topology))),
            topology,
            prefix: PREFIX.into(),
            before_7: Arc::default(),
        }
    }

    /// What the names of all keys begin with, before a colon. Default: `idempotency`.
    #[must_use]
    pub fn prefix(mut self, prefix: &str) -> Self {
        self.prefix = prefix.into();
        self
    }

    /// What a claim and an outcome have to be safe from before they count. Default: [`Durability::Master`].
    #[must_use]
    pub fn durability(mut self, durability: Durability) -> Self {
        self.confirmer = Arc::new(self.confirmer.again(Some(durability), None));
        self
    }

    /// How many claims and outcomes wait for replicas at once, each on a connection of its own. Default: 8.
    #[must_use]
    pub fn max_confirming(mut self, at_once: usize) -> Self {
        self.confirmer = Arc::new(self.confirmer.again(None, Some(at_once)));
        self
    }

    /// Refuses requests, as when the server is down, where it can evict keys, or persists nothing, or by snapshots alone, at the
    /// time of connecting.
    /// Without this a warning says so. What the user may not see is not refused: `+info` or `+config|get` shows it.
    #[must_use]
    pub fn strict(mut self) -> Self {
        self.connector = Arc::new(Connector::new(Arc::clone(&self.topology)).inspected(Inspector::strict()));
        self
    }
}

// === impl InvalidUrl ===

impl std::fmt::Display for InvalidUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "not the URL of a Redis server that can be reached: {}", self.0.category())?;
        self.0.detail().map_or(Ok(()), |detail| write!(f, " ({detail})"))
    }
}

impl std::error::Error for InvalidUrl {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0)
    }
}
