//! A connection on which commands that are asked for at the same time leave in one write.
//!
//! The client's task is woken by the first command, and a worker of tokio runs what was woken last before anything else: a
//! write for every command, and a read of the server for every write, which take more than all that this crate does for a request. So
//! that task lets those go first that are ready as well, and may have commands of their own.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::select_ok;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, Cmd, ConnectionAddr, Pipeline, RedisResult, Value};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::link::{Answer, Link, Plain};

/// How long others may take before they are not waited for, and how often they are not.
const LONG_TURN: Duration = Duration::from_millis(1);
const OWN_TURNS: u32 = 64;

/// A connection with the task that drives it.
struct Coalesced {
    connection: MultiplexedConnection,
    calls: Calls,
    /// Where the server takes nothing any more it would not end by itself.
    _driver: AbortOnDropHandle<()>,
}

/// How many calls are under way.
#[derive(Clone, Default)]
struct Calls(Arc<AtomicUsize>);

/// One of them.
struct Call(Calls);

/// The client's task, which waits for a turn where it is not alone with one call.
struct Driver<D> {
    driver: Pin<Box<D>>,
    calls: Calls,
    turn: Turn,
}

enum Turn {
    /// It is its own.
    Own,
    /// It waits for others, since then.
    Others(Instant),
    /// So many times it does not wait, since others have taken long, and so would all calls.
    OwnAgain(u32),
}

/// Connects.
pub(super) async fn connect(client: &Client, config: AsyncConnectionConfig) -> RedisResult<Arc<dyn Link>> {
    match client.get_connection_info().addr() {
        ConnectionAddr::Tcp(host, port) => over(tcp(host, *port).await?, client, config).await,
        #[cfg(unix)]
        ConnectionAddr::Unix(path) => over(tokio::net::UnixStream::connect(path).await?, client, config).await,
        // How to set up TLS is the client's own affair, and then so is the task.
        _ => Ok(Arc::new(Plain(client.get_multiplexed_async_connection_with_config(&config).await?))),
    }
}

async fn tcp(host: &str, port: u16) -> io::Result<TcpStream> {
    let addresses = lookup_host((host, port)).await?.map(|address| TcpStream::connect(address).boxed());
    let connecting: Vec<_> = addresses.collect();
    if connecting.is_empty() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the host has no address"));
    }
    // All at once: of several addresses one may lead nowhere, and say nothing.
    let (stream, _) = select_ok(connecting).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn over<S>(stream: S, client: &Client, config: AsyncConnectionConfig) -> RedisResult<Arc<dyn Link>>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let settings = client.get_connection_info().redis_settings();
    let (connection, driver) = MultiplexedConnection::new_with_config(settings, stream, config).await?;
    let calls = Calls::default();
    let driver = Driver { driver: Box::pin(driver), calls: calls.clone(), turn: Turn::Own };
    let driver = AbortOnDropHandle::new(tokio::spawn(driver));
    Ok(Arc::new(Coalesced { connection, calls, _driver: driver }))
}

// === impl Coalesced ===

impl Link for Coalesced {
    fn send<'a>(&self, command: &'a Cmd) -> Answer<'a, Value> {
        let mut connection = self.connection.clone();
        // Not by the client's trait, which takes a box for each call.
        self.calls.count(async move { connection.send_packed_command(command).await?.extract_error() })
    }

    fn ask_all<'a>(&self, command: &'a Cmd) -> Answer<'a, Vec<(String, Value)>> {
        Plain(self.connection.clone()).ask_all(command)
    }

    fn send_all<'a>(&self, name: &str, commands: &'a Pipeline) -> Answer<'a, Vec<Value>> {
        self.calls.count(Plain(self.connection.clone()).send_all(name, commands))
    }
}

// === impl Calls ===

impl Calls {
    fn count<'a, T>(&self, answer: impl Future<Output = RedisResult<T>> + Send + 'a) -> Answer<'a, T> {
        self.0.fetch_add(1, Ordering::Relaxed);
        let call = Call(self.clone());
        let ended = |answer| {
            drop(call);
            answer
        };
        answer.map(ended).boxed()
    }

    fn are_several(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 1
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

// === impl Driver ===

impl<D: Future<Output = ()>> Future for Driver<D> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.turn = match self.turn {
            Turn::Own if self.calls.are_several() => {
                self.turn = Turn::Others(Instant::now());
                // Behind all others that are ready, where any thread of the runtime takes it: one of them may block this one.
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Turn::Others(since) if since.elapsed() > LONG_TURN => Turn::OwnAgain(OWN_TURNS),
            Turn::OwnAgain(left @ 2..) => Turn::OwnAgain(left - 1),
            Turn::Own | Turn::Others(_) | Turn::OwnAgain(_) => Turn::Own,
        };
        self.driver.as_mut().poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, poll_fn};
    use std::sync::Mutex;

    use tokio::runtime::Builder;
    use tokio::sync::{mpsc, oneshot};
    use tokio::time::advance;

    use super::*;

    /// By a driver that answers what it finds each time it is polled.
    #[test]
    fn what_is_asked_at_the_same_time_is_driven_in_one_go() {
        let runtime = Builder::new_multi_thread().worker_threads(1).build().unwrap();
        let (ask, mut asked) = mpsc::channel::<oneshot::Sender<()>>(64);
        let batches = Arc::new(Mutex::new(Vec::new()));
        let (seen, calls) = (Arc::clone(&batches), Calls::default());
        let answer_all = poll_fn(move |cx| {
            let mut batch = Vec::new();
            while let Poll::Ready(more) = asked.poll_recv_many(cx, &mut batch, 64) {
                if more == 0 {
                    return Poll::Ready(());
                }
            }
            if !batch.is_empty() {
                seen.lock().unwrap().push(batch.len());
            }
            batch.into_iter().for_each(|answer| answer.send(()).unwrap());
            Poll::Pending
        });
        let driver = Driver { driver: Box::pin(answer_all), calls: calls.clone(), turn: Turn::Own };
        let call = move || {
            let ask = ask.clone();
            calls.count(async move {
                let (answer, answered) = oneshot::channel();
                ask.send(answer).await.unwrap();
                answered.await.unwrap();
                Ok(())
            })
        };
        runtime.block_on(async move {
            tokio::spawn(driver);
            call().await.unwrap();
            // All are there when the only worker comes to them.
            let (all_there, waits) = std::sync::mpsc::channel::<()>();
            tokio::spawn(async move { waits.recv() });
            let together: Vec<_> = (0..32).map(|_| tokio::spawn(call())).collect();
            drop((call, all_there));
            for call in together {
                call.await.unwrap().unwrap();
            }
        });
        let batches = batches.lock().unwrap();
        assert_eq!(batches.iter().sum::<usize>(), 33);
        assert!(batches[0] == 1 && batches.len() <= 4, "{batches:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn others_who_take_long_are_not_waited_for_again() {
        let polled = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&polled);
        let counting = poll_fn(move |_| {
            count.fetch_add(1, Ordering::Relaxed);
            Poll::<()>::Pending
        });
        let calls = Calls::default();
        let _two = [calls.count(pending::<RedisResult<()>>()), calls.count(pending())];
        let mut driver = Driver { driver: Box::pin(counting), calls, turn: Turn::Own };
        let mut polls_of = |turn| {
            assert_eq!((&mut driver).now_or_never(), None);
            (polled.swap(0, Ordering::Relaxed), advance(turn))
        };
        for turn in [LONG_TURN / 2, LONG_TURN / 2, LONG_TURN * 2] {
            let (waits, takes) = polls_of(turn);
            takes.await;
            let (goes, _) = polls_of(Duration::ZERO);
            assert_eq!((waits, goes), (0, 1));
        }
        for _ in 0..OWN_TURNS {
            assert_eq!(polls_of(Duration::ZERO).0, 1);
        }
        assert_eq!(polls_of(Duration::ZERO).0, 0, "it waits again");
    }
}
