//! A connection, whatever it leads to.

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use redis::aio::ConnectionLike;
use redis::cluster_async::ClusterConnection;
use redis::cluster_routing::{MultipleNodeRoutingInfo, Route, RoutingInfo, SingleNodeRoutingInfo, SlotAddr};
use redis::{Cmd, ErrorKind, Pipeline, RedisResult, Value, from_redis_value};

pub(super) type Answer<'a, T> = BoxFuture<'a, RedisResult<T>>;

/// A connection that many send by at once. Its answers come as long as it is held.
pub(super) trait Link: Send + Sync {
    fn send<'a>(&self, command: &'a Cmd) -> Answer<'a, Value>;

    /// Asks every master the same. Tells what each answers, by its address.
    fn ask_all<'a>(&self, command: &'a Cmd) -> Answer<'a, Vec<(String, Value)>>;

    /// Sends commands one right after the other to the node that has a key.
    fn send_all<'a>(&self, name: &str, commands: &'a Pipeline) -> Answer<'a, Vec<Value>>;
}

/// To one server.
pub(super) struct Plain<C>(pub(super) C);

/// To the nodes of a cluster.
pub(super) struct Clustered(pub(super) ClusterConnection);

impl<C: ConnectionLike + Clone + Send + Sync + 'static> Link for Plain<C> {
    fn send<'a>(&self, command: &'a Cmd) -> Answer<'a, Value> {
        send(self.0.clone(), command).boxed()
    }

    fn ask_all<'a>(&self, command: &'a Cmd) -> Answer<'a, Vec<(String, Value)>> {
        let answer = self.send(command);
        async move { Ok(vec![(String::new(), answer.await?)]) }.boxed()
    }

    fn send_all<'a>(&self, _: &str, commands: &'a Pipeline) -> Answer<'a, Vec<Value>> {
        let mut connection = self.0.clone();
        async move { commands.query_async(&mut connection).await }.boxed()
    }
}

impl Link for Clustered {
    fn send<'a>(&self, command: &'a Cmd) -> Answer<'a, Value> {
        send(self.0.clone(), command).boxed()
    }

    fn ask_all<'a>(&self, command: &'a Cmd) -> Answer<'a, Vec<(String, Value)>> {
        let (mut connection, command) = (self.0.clone(), command.clone());
        async move {
            let masters = RoutingInfo::MultiNode((MultipleNodeRoutingInfo::AllMasters, None));
            match connection.route_command(command, masters).await?.extract_error()? {
                Value::Map(nodes) => {
                    nodes.into_iter().map(|(node, answer)| Ok((from_redis_value(node)?, answer))).collect()
                }
                _ => Err((ErrorKind::UnexpectedReturnType, "an answer of no node").into()),
            }
        }
        .boxed()
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

async fn send(mut connection: impl ConnectionLike, command: &Cmd) -> RedisResult<Value> {
    connection.req_packed_command(command).await?.extract_error()
}
