//! A connection, whatever it leads to.

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use redis::aio::ConnectionLike;
use redis::cluster_async::ClusterConnection;
use redis::cluster_routing::{Route, SingleNodeRoutingInfo, SlotAddr};
use redis::{Cmd, Pipeline, RedisResult, Value};

type Answer<'a, T> = BoxFuture<'a, RedisResult<T>>;

/// A connection that many send by at once.
pub(super) trait Link: Send + Sync {
    fn send<'a>(&self, command: &'a Cmd) -> Answer<'a, Value>;

    /// Sends commands one right after the other to the node that has a key.
    fn send_all<'a>(&self, name: &str, commands: &'a Pipeline) -> Answer<'a, Vec<Value>>;
}

/// To one server.
pub(super) struct Plain<C>(pub(super) C);

/// To the nodes of a cluster.
pub(super) struct Clustered(pub(super) ClusterConnection);

impl<C: ConnectionLike + Clone + Send + Sync + 'static> Link for Plain<C> {
    fn send<'a>(&self, command: &'a Cmd) -> Answer<'a, Value> {
        send(self.0.clone(), command)
    }

    fn send_all<'a>(&self, _: &str, commands: &'a Pipeline) -> Answer<'a, Vec<Value>> {
        let mut connection = self.0.clone();
        async move { commands.query_async(&mut connection).await }.boxed()
    }
}

impl Link for Clustered {
    fn send<'a>(&self, command: &'a Cmd) -> Answer<'a, Value> {
        send(self.0.clone(), command)
    }

    fn send_all<'a>(&self, name: &str, commands: &'a Pipeline) -> Answer<'a, Vec<Value>> {
        let route = SingleNodeRoutingInfo::SpecificNode(Route::with_key(name, SlotAddr::Master));
        let (mut connection, commands) = (self.0.clone(), commands.clone());
        async move {
            let count = commands.len();
            let answers = connection.route_pipeline(commands, 0, count, route).await?;
            answers.into_iter().map(Value::extract_error).collect()
        }
        .boxed()
    }
}

fn send<C: ConnectionLike + Send + 'static>(mut connection: C, command: &Cmd) -> Answer<'_, Value> {
    async move { connection.req_packed_command(command).await?.extract_error() }.boxed()
}
