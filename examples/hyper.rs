//! The layer on a bare hyper server, without a framework: one layer around it, with rules by path.
//!
//! ```text
//! cargo run --example hyper
//! ```
//!
//! Deliver a webhook twice, and see it counted once:
//!
//! ```text
//! for i in 1 2; do curl -i http://127.0.0.1:3000/hooks/shop -d '{"id":"evt-1"}'; done
//! curl http://127.0.0.1:3000/
//! ```
//!
//! Settings, from the environment: `ADDR` (`127.0.0.1:3000`).

use std::env;
use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::time::timeout;
use tower::{BoxError, ServiceBuilder, service_fn};
use tower_idempotency::{IdempotencyLayer, Ledger, MemoryStore, RequestBody, caller, key};

/// How long what is under way may take when the server is stopped.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the layer hands on: the request with a body of its own type, which has been read already.
type Delivered = Request<RequestBody<Incoming>>;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let addr = env::var("ADDR").unwrap_or_else(|_| "127.0.0.1:3000".to_owned());
    let listener = TcpListener::bind(&addr).await.map_err(|error| format!("{addr}: {error}"))?;
    introduce(&listener.local_addr()?.to_string());

    let ledger = Ledger::new(MemoryStore::new());
    let shop = IdempotencyLayer::webhook(&ledger, key::json("$.id"));
    // Anything else that has an `Idempotency-Key` is protected as well.
    let once = IdempotencyLayer::api(&ledger, caller::authorization()).for_path("/hooks/shop", shop);

    let count = Arc::new(AtomicU64::new(0));
    let service =
        ServiceBuilder::new().layer(once).service(service_fn(move |request| handle(Arc::clone(&count), request)));

    let server = Builder::new(TokioExecutor::new());
    let connections = GracefulShutdown::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                // A client that has left before it was greeted.
                let Ok((stream, _)) = accepted else { continue };
                let served = server.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service.clone()));
                let served = connections.watch(served.into_owned());
                // Its error is that of one connection.
                tokio::spawn(async move { drop(served.await) });
            }
            _ = tokio::signal::ctrl_c() => break,
        }
    }
    // Those that are idle are closed; the others may take their time, but not for ever.
    let _ = timeout(PATIENCE, connections.shutdown()).await;
    ledger.drain(PATIENCE).await?;
    Ok(())
}

/// A handler may fail: the layer hands its error on, and the event runs again.
async fn handle(count: Arc<AtomicU64>, request: Delivered) -> Result<Response<Full<Bytes>>, BoxError> {
    let (head, body) = request.into_parts();
    Ok(match (head.method, head.uri.path()) {
        (Method::GET, "/") => answer(StatusCode::OK, format!("{} events\n", count.load(Ordering::SeqCst))),
        (Method::POST, "/hooks/shop") => {
            let event = body.collect().await?.to_bytes();
            let number = count.fetch_add(1, Ordering::SeqCst) + 1;
            answer(StatusCode::OK, format!("event {number}, of {} bytes\n", event.len()))
        }
        _ => answer(StatusCode::NOT_FOUND, "there is nothing here\n".to_owned()),
    })
}

fn answer(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    response
}

#[allow(clippy::print_stdout, reason = "it talks to whoever started it")]
fn introduce(addr: &str) {
    println!("The shop listens at http://{addr} (POST /hooks/shop)");
}
