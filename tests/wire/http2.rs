//! Many streams of one connection.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use http_body::Frame;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tower_idempotency::key::header;
use tower_idempotency::{IdempotencyLayer, Ledger, MemoryStore};

use crate::common::app::{Body, answer, body, chunk, frames};
use crate::common::until;
use crate::peers::{Server, api, webhook};

const WAIT: Duration = Duration::from_secs(20);

async fn connect(server: &Server) -> SendRequest<Body> {
    let stream = TcpStream::connect(server.addr).await.unwrap();
    let (sender, connection) = handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(async move {
        let _ = pin!(connection).await;
    });
    sender
}

fn post(key: &str, body: Body) -> Request<Body> {
    let request = Request::post("http://localhost/").header("x-id", key).header("idempotency-key", key);
    request.body(body).unwrap()
}

async fn send(sender: &SendRequest<Body>, request: Request<Body>) -> Response<Incoming> {
    timeout(WAIT, sender.clone().send_request(request)).await.expect("an answer").unwrap()
}

fn is_replayed(response: &Response<Incoming>) -> bool {
    response.headers().contains_key("idempotent-replayed")
}

fn trailers() -> HeaderMap {
    HeaderMap::from_iter([(HeaderName::from_static("x-sum"), HeaderValue::from_static("7"))])
}

#[tokio::test]
async fn duplicates_that_wait_do_not_stall_the_other_streams() {
    const DUPLICATES: usize = 24;
    // Together far more than a connection may have under way: whoever leaves it unread stops the connection.
    let large = || body(vec![b'x'; 256 << 10]);
    let ledger = Ledger::new(MemoryStore::new());
    let layer = IdempotencyLayer::webhook(&ledger, header("X-Id")).patience(WAIT);
    let gate = Arc::new(Semaphore::new(0));
    let opened = Arc::clone(&gate);
    let server = Server::start(&layer, move |request, run| {
        let opened = Arc::clone(&opened);
        async move {
            let is_gated = request.headers()["x-id"] == "gated";
            let read = request.into_body().collect().await?.to_bytes().len();
            if is_gated {
                opened.acquire().await?.forget();
            }
            answer(200, format!("run {run}: {read} bytes"))
        }
    })
    .await;
    let sender = connect(&server).await;
    let waiting = join_all((0..=DUPLICATES).map(|_| send(&sender, post("gated", large()))));
    let others = async {
        until(async || ledger.waiting() == DUPLICATES).await;
        for (id, replayed) in [("a", false), ("b", false), ("a", true)] {
            assert_eq!(is_replayed(&send(&sender, post(id, large())).await), replayed);
        }
        assert_eq!((server.runs(), ledger.waiting()), (3, DUPLICATES), "they still wait");
        gate.add_permits(1);
    };
    let (answered, ()) = futures_util::join!(waiting, others);
    assert_eq!(answered.iter().filter(|response| is_replayed(response)).count(), DUPLICATES);
    assert!(answered.iter().all(|response| response.status() == 200));
    assert_eq!(server.runs(), 3);
}

#[tokio::test]
async fn e08_trailers_of_a_request_reach_the_handler_over_http_2() {
    for layer in [webhook(), webhook().stream_request_body(), api()] {
        let server = Server::start(&layer, |request, _| async move {
            let seen = request.into_body().collect().await?;
            assert_eq!(seen.trailers(), Some(&trailers()));
            Ok(Response::new(body(seen.to_bytes())))
        })
        .await;
        let sender = connect(&server).await;
        for replayed in [false, true] {
            let sent = frames(vec![chunk("ab"), chunk("cd"), Ok(Frame::trailers(trailers()))]);
            let response = send(&sender, post("k", sent)).await;
            assert_eq!((response.status().as_u16(), is_replayed(&response)), (200, replayed));
            assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "abcd");
        }
        assert_eq!(server.runs(), 1);
    }
}

#[tokio::test]
async fn trailers_of_a_response_are_told_again() {
    for layer in [webhook(), api()] {
        // With and without a body before them.
        for data in [vec![chunk("ab"), chunk("cd")], vec![]] {
            let length = data.len() * 2;
            let data: Arc<[Bytes]> = data.into_iter().map(|frame| frame.unwrap().into_data().unwrap()).collect();
            let server = Server::start(&layer, move |_, _| {
                let data = data.iter().cloned().map(|data| Ok(Frame::data(data)));
                let told = data.chain([Ok(Frame::trailers(trailers()))]).collect();
                async move { Ok(Response::new(frames(told))) }
            })
            .await;
            let sender = connect(&server).await;
            let key = length.to_string();
            for replayed in [false, true] {
                let response = send(&sender, post(&key, body("1"))).await;
                assert_eq!(is_replayed(&response), replayed);
                let whole = timeout(WAIT, response.into_body().collect()).await.unwrap().unwrap();
                assert_eq!(whole.trailers(), Some(&trailers()));
                assert_eq!(whole.to_bytes().len(), length);
            }
        }
    }
}

#[tokio::test]
async fn a_body_over_the_limit_costs_its_stream_and_not_the_connection() {
    for layer in [webhook(), api()] {
        let server = Server::start(&layer.max_request_body(64), |_, _| async { answer(200, "") }).await;
        let sender = connect(&server).await;
        let counted = frames((0..64).map(|_| chunk("xx")).collect());
        for too_large in [body(vec![b'x'; 1 << 20]), counted] {
            assert_eq!(send(&sender, post("k", too_large)).await.status(), 413);
        }
        assert_eq!(server.runs(), 0);
        assert_eq!(send(&sender, post("k", body("small"))).await.status(), 200);
    }
}
