//! Where the server is: alone, in a cluster, behind sentinels, or where a function of the caller's own finds it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crc16::{State, XMODEM};
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, join_all};
use redis::aio::{AsyncPushSender, ConnectionLike, MultiplexedConnection};
use redis::cluster::ClusterClientBuilder;
use redis::cluster_async::ClusterConnection;
use redis::io::tcp::TcpSettings;
use redis::sentinel::{SentinelClient, SentinelClientBuilder, SentinelServerType};
use redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, ConnectionInfo, ErrorKind, IntoConnectionInfo, ProtocolVersion,
    RedisError, RedisResult, TlsMode,
};

use super::coalesce;
use super::failure::without_arguments;
use super::link::{Clustered, Link, Plain};

/// How long connecting may take, with the greeting and all that is asked on the way.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// One frozen node, or sentinel, must not use up the time of the others.
const ONE_OF_MANY_TIMEOUT: Duration = Duration::from_millis(300);
const MANY_TIMEOUT: Duration = Duration::from_secs(3);

/// How long the server may take to confirm a subscription.
const CONFIRMATION_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a node of a cluster may take for what its client asks by itself. What a store asks has the deadline of whoever asks
/// it, and would only have a second timer.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);

/// How often the cluster client follows a slot that has moved or a node that was lost, and its pauses in between, in ms.
const CLUSTER_RETRIES: u32 = 2;
const MIN_CLUSTER_PAUSE: u64 = 10;
const MAX_CLUSTER_PAUSE: u64 = 50;

const SLOTS: u16 = 16 << 10;
/// Slots in a row mostly have one node: what fails for some of them fails for their neighbours.
const SLOTS_IN_DOMAIN: u16 = 256;

/// Where the server is.
pub(super) enum Topology {
    /// Some nodes of the cluster, by which the others are found.
    Cluster(Vec<ConnectionInfo>),
    Custom(Box<Factory>),
    Node(Client),
    Sentinel(Sentinels),
}

type Factory = dyn Fn() -> BoxFuture<'static, RedisResult<Arc<dyn Link>>> + Send + Sync;

/// The servers that know which one is the master, and the name they know it by.
pub(super) struct Sentinels {
    sentinels: Vec<ConnectionInfo>,
    master: ConnectionInfo,
    name: String,
}

/// A connection that subscribes.
pub(super) enum Listener {
    Cluster(ClusterConnection),
    Node(MultiplexedConnection),
}

// === impl Topology ===

impl Topology {
    pub(super) fn node(url: &str) -> RedisResult<Self> {
        Ok(Self::Node(Client::open(without_delay(url)?)?))
    }

    pub(super) fn cluster(urls: &[&str]) -> RedisResult<Self> {
        let nodes: Vec<_> = urls.iter().map(|url| without_delay(url)).collect::<RedisResult<_>>()?;
        // Says what is wrong with them, but where the first has no user or password and others have.
        ClusterClientBuilder::new(nodes.clone()).build()?;
        alike(&nodes, |node| (node.redis_settings().username(), node.redis_settings().password()))?;
        Ok(Self::Cluster(nodes))
    }

    pub(super) fn sentinel(urls: &[&str], master: &str) -> RedisResult<Self> {
        let sentinels: Vec<_> = urls.iter().map(|url| without_delay(url)).collect::<RedisResult<_>>()?;
        // All are told the password of the first, and none is to be told it less safely.
        alike(&sentinels, tls_mode)?;
        let master = without_delay(master)?;
        let (ConnectionAddr::Tcp(name, _) | ConnectionAddr::TcpTls { host: name, .. }) = master.addr() else {
            return Err(RedisError::from((ErrorKind::InvalidClientConfig, "a master is named by the host of its URL")));
        };
        let name = name.clone();
        let sentinels = Sentinels { sentinels, master, name };
        sentinels.client(ProtocolVersion::RESP2)?;
        Ok(Self::Sentinel(sentinels))
    }

    pub(super) fn custom<F, C>(factory: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = RedisResult<C>> + Send + 'static,
        C: ConnectionLike + Clone + Send + Sync + 'static,
    {
        Self::Custom(Box::new(move || {
            let connecting = factory();
            async move { Ok(Arc::new(Plain(connecting.await?)) as Arc<dyn Link>) }.boxed()
        }))
    }

    pub(super) const fn is_cluster(&self) -> bool {
        matches!(self, Self::Cluster(_))
    }

    /// The command that tells those who listen.
    pub(super) const fn publish(&self) -> &'static str {
        // Within the shard: the other has to reach every node of a cluster.
        if self.is_cluster() { "SPUBLISH" } else { "PUBLISH" }
    }

    /// What a key fails together with.
    pub(super) fn domain(&self, name: &str) -> u16 {
        if self.is_cluster() { slot(name) / SLOTS_IN_DOMAIN } else { 0 }
    }

    /// Connects, in bounded time.
    pub(super) async fn connect(&self) -> RedisResult<Arc<dyn Link>> {
        self.bounded(async {
            Ok::<Arc<dyn Link>, _>(match self {
                Self::Cluster(nodes) => Arc::new(Clustered(cluster(nodes).build()?.get_async_connection().await?)),
                Self::Custom(factory) => factory().await?,
                Self::Node(client) => coalesce::connect(client, unbounded()).await?,
                Self::Sentinel(sentinels) => {
                    let client = sentinels.client(ProtocolVersion::RESP2)?.async_get_client().await?;
                    connected_within(CONNECT_TIMEOUT, coalesce::connect(&client, unbounded())).await?
                }
            })
        })
        .await
    }

    /// Whether there is a way to listen: only the caller knows how its connections are made.
    pub(super) const fn can_listen(&self) -> bool {
        !matches!(self, Self::Custom(_))
    }

    /// Connects to listen.
    pub(super) async fn listen(&self, receiver: impl AsyncPushSender) -> RedisResult<Listener> {
        self.bounded(async {
            Ok(match self {
                Self::Cluster(nodes) => {
                    let builder = cluster(nodes).use_protocol(ProtocolVersion::RESP3).push_sender(receiver);
                    Listener::Cluster(builder.build()?.get_async_connection().await?)
                }
                Self::Custom(_) => return Err((ErrorKind::InvalidClientConfig, "it makes none that listens").into()),
                Self::Node(client) => {
                    let info = client.get_connection_info().clone();
                    let settings = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
                    let client = Client::open(info.set_redis_settings(settings))?;
                    Listener::Node(open_alone(&client, receiver).await?)
                }
                Self::Sentinel(sentinels) => {
                    let client = sentinels.client(ProtocolVersion::RESP3)?.async_get_client().await?;
                    Listener::Node(open_alone(&client, receiver).await?)
                }
            })
        })
        .await
    }

    async fn bounded<T>(&self, connecting: impl Future<Output = RedisResult<T>>) -> RedisResult<T> {
        let timeout = if matches!(self, Self::Node(_)) { CONNECT_TIMEOUT } else { MANY_TIMEOUT };
        connected_within(timeout, connecting).await.map_err(without_arguments)
    }
}

impl fmt::Debug for Topology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cluster(_) => "Cluster",
            Self::Custom(_) => "Custom",
            Self::Node(_) => "Node",
            Self::Sentinel(_) => "Sentinel",
        })
    }
}

async fn connected_within<T>(timeout: Duration, connecting: impl Future<Output = RedisResult<T>>) -> RedisResult<T> {
    let too_long = |_| Err(RedisError::from((ErrorKind::Io, "connecting took too long")));
    tokio::time::timeout(timeout, connecting).await.unwrap_or_else(too_long)
}

/// A connection that nobody sends by at once with others.
async fn open_alone(client: &Client, receiver: impl AsyncPushSender) -> RedisResult<MultiplexedConnection> {
    let config = unbounded().set_push_sender(receiver).set_connection_timeout(Some(CONNECT_TIMEOUT));
    client.get_multiplexed_async_connection_with_config(&config).await
}

/// Whoever asks has a deadline of its own.
fn unbounded() -> AsyncConnectionConfig {
    AsyncConnectionConfig::new().set_response_timeout(None)
}

fn cluster(nodes: &[ConnectionInfo]) -> ClusterClientBuilder {
    ClusterClientBuilder::new(nodes.iter().cloned())
        .connection_timeout(ONE_OF_MANY_TIMEOUT)
        .response_timeout(RESPONSE_TIMEOUT)
        .retries(CLUSTER_RETRIES)
        .min_retry_wait(MIN_CLUSTER_PAUSE)
        .max_retry_wait(MAX_CLUSTER_PAUSE)
        .tcp_settings(nodelay())
}

fn without_delay(url: &str) -> RedisResult<ConnectionInfo> {
    Ok(url.into_connection_info()?.set_tcp_settings(nodelay()))
}

/// Fails where one of them differs from the first.
fn alike<'a, T: PartialEq>(nodes: &'a [ConnectionInfo], of: impl Fn(&'a ConnectionInfo) -> T) -> RedisResult<()> {
    let first = nodes.first().map(&of);
    match nodes.iter().all(|node| Some(of(node)) == first) {
        true => Ok(()),
        false => Err((ErrorKind::InvalidClientConfig, "all need the same user, password and TLS").into()),
    }
}

fn nodelay() -> TcpSettings {
    TcpSettings::default().set_nodelay(true)
}

/// The slot of a key: that of what stands in its first braces, where something does.
fn slot(name: &str) -> u16 {
    let tag = name.split_once('{').and_then(|(_, rest)| rest.split_once('}')).map(|(tag, _)| tag);
    let tag = tag.filter(|tag| !tag.is_empty()).unwrap_or(name);
    State::<XMODEM>::calculate(tag.as_bytes()) % SLOTS
}

// === impl Sentinels ===

impl Sentinels {
    /// All of them, from any of them on: one that is cut off with the old master names that one for ever.
    fn in_turn(&self) -> impl Iterator<Item = &ConnectionInfo> {
        let count = self.sentinels.len();
        self.sentinels.iter().cycle().skip(rand::random_range(0..count.max(1))).take(count)
    }

    /// A client that has asked nobody yet.
    fn client(&self, protocol: ProtocolVersion) -> RedisResult<SentinelClient> {
        let addresses = self.in_turn().map(|sentinel| sentinel.addr().clone());
        let mut builder = SentinelClientBuilder::new(addresses, &self.name, SentinelServerType::Master)?
            .set_client_to_redis_protocol(protocol)
            .set_client_to_redis_db(self.master.redis_settings().db())
            .set_client_to_redis_tcp_settings(nodelay())
            .set_client_to_sentinel_tcp_settings(nodelay());
        if let Some(mode) = tls_mode(&self.master) {
            builder = builder.set_client_to_redis_tls_mode(mode);
        }
        if let Some(username) = self.master.redis_settings().username() {
            builder = builder.set_client_to_redis_username(username);
        }
        if let Some(password) = self.master.redis_settings().password() {
            builder = builder.set_client_to_redis_password(password);
        }
        // They are one deployment: what holds for the first holds for all.
        let Some(sentinel) = self.sentinels.first() else { return builder.build() };
        if let Some(username) = sentinel.redis_settings().username() {
            builder = builder.set_client_to_sentinel_username(username);
        }
        if let Some(password) = sentinel.redis_settings().password() {
            builder = builder.set_client_to_sentinel_password(password);
        }
        builder.build()
    }
}

fn tls_mode(info: &ConnectionInfo) -> Option<TlsMode> {
    match info.addr() {
        ConnectionAddr::TcpTls { insecure: true, .. } => Some(TlsMode::Insecure),
        ConnectionAddr::TcpTls { insecure: false, .. } => Some(TlsMode::Secure),
        _ => None,
    }
}

// === impl Listener ===

impl Listener {
    /// Subscribes, each in time. Tells which of the names of a cluster it could not subscribe to: one shard may be silent while
    /// the others answer.
    pub(super) async fn subscribe<'n>(&mut self, names: &[&'n str]) -> RedisResult<Vec<&'n str>> {
        match self {
            Self::Node(connection) => in_time(connection.subscribe(names)).await.map(|()| Vec::new()),
            // One command names channels of one slot.
            Self::Cluster(connection) => Ok(each(names, |name| {
                let mut connection = connection.clone();
                async move { connection.ssubscribe(name).await }
            })
            .await),
        }
    }

    pub(super) async fn unsubscribe(&mut self, names: &[&str]) -> RedisResult<()> {
        match self {
            Self::Node(connection) => in_time(connection.unsubscribe(names)).await,
            // What cannot be left is in a part that does not answer, and says nothing.
            Self::Cluster(connection) => {
                let leave = |name| {
                    let mut connection = connection.clone();
                    async move { connection.sunsubscribe(name).await }
                };
                each(names, leave).await;
                Ok(())
            }
        }
    }
}

/// Those for which the call failed.
async fn each<'n, F: Future<Output = RedisResult<()>>>(names: &[&'n str], call: impl Fn(&'n str) -> F) -> Vec<&'n str> {
    let called = join_all(names.iter().map(|name| in_time(call(name)))).await;
    names.iter().zip(called).filter(|(_, result)| result.is_err()).map(|(name, _)| *name).collect()
}

async fn in_time(call: impl Future<Output = RedisResult<()>>) -> RedisResult<()> {
    let too_long = |_| Err(RedisError::from((ErrorKind::Io, "no confirmation in time")));
    tokio::time::timeout(CONFIRMATION_TIMEOUT, call).await.unwrap_or_else(too_long)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn nodes_of_one_deployment_are_reached_alike() {
        let is_cluster = |urls: &[&str]| Topology::cluster(urls).is_ok();
        assert!(is_cluster(&["redis://u:p@a", "redis://u:p@b:7000"]));
        for other in ["redis://b", "redis://u:q@b", "redis://v:p@b", "rediss://u:p@b", "redis+unix:///b"] {
            assert!(!is_cluster(&["redis://u:p@a", other]), "{other}");
            assert!(!is_cluster(&[other, "redis://u:p@a"]), "{other}");
        }
        assert!(!is_cluster(&[]));

        let is_sentinel = |urls: &[&str]| Topology::sentinel(urls, "redis://orders/0").is_ok();
        assert!(is_sentinel(&["redis://:p@a", "redis://b", "redis+unix:///c"]));
        assert!(!is_sentinel(&[]) && Topology::sentinel(&["redis://a"], "redis+unix:///orders").is_err());
    }

    #[test]
    fn any_sentinel_is_asked_first() {
        let urls = ["redis://a", "redis://b", "redis://c"];
        let Topology::Sentinel(sentinels) = Topology::sentinel(&urls, "redis://orders").unwrap() else { panic!() };
        let turns = (0..100).map(|_| sentinels.in_turn().map(|one| one.addr().to_string()).collect::<Vec<_>>());
        let turns: HashSet<_> = turns.collect();
        assert!(turns.len() == 3 && turns.iter().all(|turn| turn.len() == 3), "{turns:?}");
    }

    #[cfg(feature = "redis-tls")]
    #[test]
    fn a_password_that_tls_keeps_is_told_nobody_without() {
        let is_sentinel = |urls: &[&str]| Topology::sentinel(urls, "rediss://orders/0").is_ok();
        assert!(is_sentinel(&["rediss://:p@a", "rediss://b"]));
        for other in ["redis://b", "rediss://b/#insecure", "redis+unix:///b"] {
            assert!(!is_sentinel(&["rediss://:p@a", other]), "{other}");
            assert!(!is_sentinel(&[other, "rediss://:p@a"]), "{other}");
        }
    }

    #[test]
    fn slots_are_those_of_the_specification() {
        // https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/
        assert_eq!(slot("123456789"), 0x31C3 % SLOTS);
        assert_eq!(slot("idempotency:{123456789}"), slot("123456789"));
        assert_eq!(slot("foo{}{bar}"), slot("foo{}{bar}"));
        assert_ne!(slot("foo{}{bar}"), slot("bar"));
        assert_eq!(slot("foo{{bar}}zap"), slot("{bar"));
    }
}
