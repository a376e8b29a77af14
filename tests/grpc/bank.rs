//! A bank that says what it is told to, and counts how often it is asked.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use http::HeaderMap;
use http_body::Frame;
use http_body_util::BodyExt as _;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tonic::metadata::MetadataMap;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Server};
use tonic::{Request, Response, Status, Streaming};
use tower::util::MapResponseLayer;
use tower_idempotency::{Attempt, IdempotencyLayer, Ledger, MemoryStore, caller, key};

use crate::payments::payments_client::PaymentsClient;
use crate::payments::payments_server::{Payments, PaymentsServer};
use crate::payments::{ChargeRequest, Receipt, TotalRequest, TotalResponse, WatchRequest};

pub(crate) const CHARGE: &str = "/payments.v1.Payments/Charge";

/// What a handler does with an attempt.
pub(crate) type Steer = fn(&Attempt);

#[derive(Clone, Default)]
pub(crate) struct Bank(Arc<Inner>);

struct Inner {
    runs: AtomicU32,
    plan: Mutex<VecDeque<Result<u64, Status>>>,
    steer: Mutex<Option<Steer>>,
    /// What a charge waits for, and each message of a stream.
    gate: Semaphore,
}

impl Default for Inner {
    fn default() -> Self {
        let gate = Semaphore::new(Semaphore::MAX_PERMITS);
        Self { runs: AtomicU32::new(0), plan: Mutex::default(), steer: Mutex::default(), gate }
    }
}

impl Bank {
    /// The outcomes of the next charges. After them it charges what it is asked to.
    pub(crate) fn plan(&self, outcomes: impl IntoIterator<Item = Result<u64, Status>>) {
        self.0.plan.lock().unwrap().extend(outcomes);
    }

    pub(crate) fn steer(&self, steer: Steer) {
        *self.0.steer.lock().unwrap() = Some(steer);
    }

    /// Lets nothing through from now on but what is admitted.
    pub(crate) fn close(&self) {
        self.0.gate.forget_permits(Semaphore::MAX_PERMITS);
    }

    pub(crate) fn admit(&self, count: usize) {
        self.0.gate.add_permits(count);
    }

    pub(crate) fn runs(&self) -> u32 {
        self.0.runs.load(Ordering::SeqCst)
    }

    async fn pass(&self) {
        self.0.gate.acquire().await.unwrap().forget();
    }
}

#[tonic::async_trait]
impl Payments for Bank {
    type WatchStream = BoxStream<'static, Result<Receipt, Status>>;
    type TotalsStream = BoxStream<'static, Result<TotalResponse, Status>>;

    async fn charge(&self, request: Request<ChargeRequest>) -> Result<Response<Receipt>, Status> {
        let number = u64::from(self.0.runs.fetch_add(1, Ordering::SeqCst)) + 1;
        if let (Some(steer), Some(attempt)) = (*self.0.steer.lock().unwrap(), request.extensions().get::<Attempt>()) {
            steer(attempt);
        }
        self.pass().await;
        let planned = self.0.plan.lock().unwrap().pop_front();
        let cents = planned.unwrap_or(Ok(request.get_ref().cents))?;
        let mut response = Response::new(Receipt { number, cents });
        response.metadata_mut().insert("receipt", number.to_string().parse().unwrap());
        response.metadata_mut().insert_bin("seal-bin", tonic::metadata::MetadataValue::from_bytes(b"\0\xff"));
        Ok(response)
    }

    async fn total(&self, _: Request<TotalRequest>) -> Result<Response<TotalResponse>, Status> {
        self.0.runs.fetch_add(1, Ordering::SeqCst);
        Ok(Response::new(TotalResponse { cents: 0 }))
    }

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        self.0.runs.fetch_add(1, Ordering::SeqCst);
        let bank = self.clone();
        let receipts = stream::iter(1..=2).then(move |number| {
            let bank = bank.clone();
            async move {
                bank.pass().await;
                Ok(Receipt { number, cents: 0 })
            }
        });
        Ok(Response::new(receipts.boxed()))
    }

    async fn totals(&self, requests: Request<Streaming<TotalRequest>>) -> Result<Response<Self::TotalsStream>, Status> {
        self.0.runs.fetch_add(1, Ordering::SeqCst);
        let totals = requests
            .into_inner()
            .map(|request| request.map(|request| TotalResponse { cents: request.account.len() as u64 }));
        Ok(Response::new(totals.boxed()))
    }
}

/// A server with a layer around it. It ends with the test.
pub(crate) struct Served {
    pub(crate) addr: SocketAddr,
    pub(crate) bank: Bank,
    task: JoinHandle<()>,
}

impl Served {
    pub(crate) async fn by(layer: IdempotencyLayer) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let bank = Bank::default();
        let gzip = tonic::codec::CompressionEncoding::Gzip;
        let service = PaymentsServer::new(bank.clone()).accept_compressed(gzip).send_compressed(gzip);
        let server = Server::builder()
            .layer(layer)
            .layer(MapResponseLayer::new(|response: http::Response<tonic::body::Body>| {
                response.map(|body| tonic::body::Body::new(body.map_frame(with_trailers)))
            }))
            .add_service(service);
        let task = tokio::spawn(async move {
            server.serve_with_incoming(TcpIncoming::from(listener)).await.unwrap();
        });
        Self { addr, bank, task }
    }

    pub(crate) async fn client(&self) -> PaymentsClient<Channel> {
        PaymentsClient::connect(format!("http://{}", self.addr)).await.unwrap()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A handler of tonic has no trailers of its own for what went well.
fn with_trailers(mut frame: Frame<Bytes>) -> Frame<Bytes> {
    if let Some(trailers) = frame.trailers_mut() {
        trailers.insert("cost", "7".parse().unwrap());
        trailers.append("tag", "a".parse().unwrap());
        trailers.append("tag", "b".parse().unwrap());
    }
    frame
}

pub(crate) fn ledger() -> Ledger {
    Ledger::new(MemoryStore::new())
}

/// The layer of most tests: `Charge` is protected, by the key in its metadata.
pub(crate) fn api(ledger: &Ledger) -> IdempotencyLayer {
    IdempotencyLayer::api(ledger, caller::shared()).unary(CHARGE)
}

pub(crate) fn webhook(ledger: &Ledger) -> IdempotencyLayer {
    IdempotencyLayer::webhook(ledger, key::metadata("idempotency-key")).unary(CHARGE)
}

/// A charge of so much, with a key in its metadata.
pub(crate) fn charge(key: &str, cents: u64) -> Request<ChargeRequest> {
    keyed(key, ChargeRequest { request_id: "r-1".to_owned(), account: "ada".to_owned(), cents })
}

pub(crate) fn keyed<T>(key: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    if !key.is_empty() {
        request.metadata_mut().insert("idempotency-key", key.parse().unwrap());
    }
    request
}

/// Metadata without what differs from one response to the next.
pub(crate) fn kept(metadata: &MetadataMap) -> HeaderMap {
    let mut headers = metadata.clone().into_headers();
    headers.remove("date");
    headers.remove("idempotent-replayed");
    headers
}

pub(crate) fn is_replayed(metadata: &MetadataMap) -> bool {
    metadata.get("idempotent-replayed").is_some_and(|replayed| replayed == "true")
}
