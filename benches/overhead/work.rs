//! Work to be measured: requests to a service, with and without the layer.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::hint::black_box;
use std::pin::pin;

use bytes::Bytes;
use futures_util::future::join_all;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Request, Response, StatusCode};
use http_body::Body;
use http_body_util::{BodyExt as _, Full};
use tokio::runtime::Runtime;
use tower::{Layer as _, Service, service_fn};
use tower_idempotency::{IdempotencyLayer, Ledger, MemoryStore, RequestBody};

use super::cost::Cost;
use super::payload::Pieces;

/// How many requests are made before the clock starts, so that making them costs nothing.
const BATCH: u64 = 256;

/// The usual outcome of a webhook.
pub const OUTCOME: &[u8] =
    br#"{"status":"accepted","order":"ord_1MowQVLkdIwHu7ixeRlqHVzs","invoiced":true,"paid":false}"#;

/// How many requests there are at the same time.
pub const CROWD: u64 = 64;

/// A thread that starts tasks and runs them itself: what is measured is the layer's own work, and not how long two threads take to wake
/// each other, which is the machine's matter.
pub fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn no_op<B>(_: Request<B>) -> Ready<Result<Response<Full<Bytes>>, Infallible>> {
    let mut response = Response::new(Full::new(Bytes::from_static(OUTCOME)));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    ready(Ok(response))
}

/// So many requests to the service alone, so many of them at once.
pub fn bare(count: u64, at_once: u64, request: impl Fn(u64) -> Request<Pieces>) -> Cost {
    send(&runtime(), service_fn(no_op::<Pieces>), count, at_once, request)
}

/// So many requests, so many of them at once, through a layer over an empty store. The first of them has been sent before.
pub fn layered(
    layer: impl Fn(&Ledger) -> IdempotencyLayer,
    count: u64,
    at_once: u64,
    request: impl Fn(u64) -> Request<Pieces>,
) -> Cost {
    let runtime = runtime();
    let ledger = Ledger::new(MemoryStore::new().max_keys(usize::MAX).max_bytes(usize::MAX));
    let mut service = layer(&ledger).layer(service_fn(no_op::<RequestBody<Pieces>>));
    runtime.block_on(read(service.call(request(0))));
    send(&runtime, service, count, at_once, |n| request(n + at_once))
}

fn send<S, R>(
    runtime: &Runtime,
    mut service: S,
    count: u64,
    at_once: u64,
    request: impl Fn(u64) -> Request<Pieces>,
) -> Cost
where
    S: Service<Request<Pieces>, Response = Response<R>, Error = Infallible>,
    R: Body<Data = Bytes>,
{
    let mut cost = Cost::default();
    let mut sent = 0;
    while sent < count {
        let batch = BATCH.min(count - sent);
        let mut requests: Vec<_> = (sent..sent + batch).rev().map(&request).collect();
        cost += Cost::of(|| {
            runtime.block_on(async {
                while let Some(request) = requests.pop() {
                    if at_once == 1 {
                        read(service.call(request)).await;
                    } else {
                        let more = requests.split_off(requests.len().saturating_sub(at_once as usize - 1));
                        let crowd = std::iter::once(request).chain(more.into_iter().rev());
                        join_all(crowd.map(|request| read(service.call(request)))).await;
                    }
                }
                // What the last of them left to do counts, too.
                tokio::task::yield_now().await;
            });
        });
        sent += batch;
    }
    cost
}

async fn read<R: Body>(response: impl Future<Output = Result<Response<R>, Infallible>>) {
    let (head, body) = response.await.unwrap().into_parts();
    assert_eq!(head.status, StatusCode::OK);
    let mut body = pin!(body);
    while let Some(frame) = body.frame().await {
        black_box(frame.ok());
    }
}
