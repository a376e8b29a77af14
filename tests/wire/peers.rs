//! A server, and a client that writes and reads the bytes of HTTP/1.1 itself.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tower::{BoxError, Layer, Service, service_fn};
use tower_idempotency::key::header;
use tower_idempotency::{IdempotencyLayer, Ledger, MemoryStore, RequestBody, caller};

use crate::common::app::Body;

/// For how long a peer is waited for at most.
const WAIT: Duration = Duration::from_secs(20);

pub type Received = Request<RequestBody<Incoming>>;

pub fn webhook() -> IdempotencyLayer {
    IdempotencyLayer::webhook(&Ledger::new(MemoryStore::new()), header("X-Id"))
}

pub fn api() -> IdempotencyLayer {
    IdempotencyLayer::api(&Ledger::new(MemoryStore::new()), caller::shared())
}

/// The head and the body of a request with a key for either contract. `lines` end in `\r\n`.
pub fn post(key: &str, lines: &str, body: &str) -> String {
    let length = body.len();
    format!("{}content-length: {length}\r\n{lines}\r\n{body}", head("POST", key))
}

/// The head of a request with a key for either contract, but for the line that ends it.
pub fn head(method: &str, key: &str) -> String {
    format!("{method} / HTTP/1.1\r\nhost: localhost\r\nx-id: {key}\r\nidempotency-key: {key}\r\n")
}

pub struct Server {
    pub addr: SocketAddr,
    runs: Arc<AtomicU32>,
}

impl Server {
    /// The handler gets the request and the number of its run.
    pub async fn start<F, R>(layer: &IdempotencyLayer, handler: F) -> Self
    where
        F: Fn(Received, u32) -> R + Clone + Send + 'static,
        R: Future<Output = Result<Response<Body>, BoxError>> + Send + 'static,
    {
        let runs = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&runs);
        let handler = service_fn(move |request| handler(request, count.fetch_add(1, Ordering::SeqCst) + 1));
        Self { addr: serve(layer.layer(handler)).await, runs }
    }

    pub fn runs(&self) -> u32 {
        self.runs.load(Ordering::SeqCst)
    }

    pub async fn connect(&self) -> Client {
        Client::connect(self.addr).await
    }
}

pub async fn serve<S, B>(service: S) -> SocketAddr
where
    S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send,
    B: http_body::Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let service = TowerToHyperService::new(service.clone());
            tokio::spawn(async move {
                let server = auto::Builder::new(TokioExecutor::new());
                // Whatever its client does to it is the test's to see.
                let _ = server.serve_connection_with_upgrades(TokioIo::new(stream), service).await;
            });
        }
    });
    addr
}

pub struct Client {
    stream: TcpStream,
    read: BytesMut,
}

/// A response as it came over the wire.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Told {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
    pub trailers: HeaderMap,
}

impl Client {
    pub async fn connect(addr: SocketAddr) -> Self {
        Self { stream: TcpStream::connect(addr).await.unwrap(), read: BytesMut::new() }
    }

    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.try_send(bytes).await.unwrap();
    }

    pub async fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        timeout(WAIT, self.stream.write_all(bytes.as_ref())).await.expect("a server that reads")
    }

    /// Sends no more, and reads on.
    pub async fn half_close(&mut self) {
        self.stream.shutdown().await.unwrap();
    }

    /// Sends a request with a key and reads its response.
    pub async fn ask(&mut self, key: &str, lines: &str, body: &str) -> Told {
        self.send(post(key, lines, body)).await;
        self.told().await
    }

    /// Reads the next response, be it interim.
    pub async fn told(&mut self) -> Told {
        self.try_told().await.expect("a whole response")
    }

    pub async fn try_told(&mut self) -> io::Result<Told> {
        let mut told = self.told_without_body().await?;
        if let 100..200 | 204 | 304 = told.status {
            return Ok(told);
        }
        if let Some(length) = told.headers.get("content-length") {
            let length = length.to_str().unwrap().parse().unwrap();
            told.body = self.bytes(length).await?;
        } else if told.headers.get("transfer-encoding").is_some_and(|coding| coding == "chunked") {
            loop {
                let length = usize::from_str_radix(&self.line().await?, 16).unwrap();
                if length == 0 {
                    break;
                }
                told.body.extend(self.bytes(length).await?);
                assert_eq!(self.line().await?, "");
            }
            told.trailers = self.lines().await?;
        } else {
            while self.more().await? > 0 {}
            told.body = self.read.split().to_vec();
        }
        Ok(told)
    }

    /// Reads the next response, which has no body whatever its head says.
    pub async fn told_without_body(&mut self) -> io::Result<Told> {
        let line = self.line().await?;
        let status = line.strip_prefix("HTTP/1.").expect("a status line")[2..5].parse().unwrap();
        Ok(Told { status, headers: self.lines().await?, ..Told::default() })
    }

    /// Returns when the server has closed the connection, which it does without another word.
    pub async fn is_closed(&mut self) -> bool {
        while let Ok(1..) = self.more().await {}
        self.read.is_empty()
    }

    pub async fn bytes(&mut self, length: usize) -> io::Result<Vec<u8>> {
        while self.read.len() < length {
            self.some().await?;
        }
        Ok(self.read.split_to(length).to_vec())
    }

    async fn lines(&mut self) -> io::Result<HeaderMap> {
        let mut lines = HeaderMap::new();
        loop {
            let line = self.line().await?;
            let Some((name, value)) = line.split_once(": ") else { return Ok(lines) };
            lines.append(HeaderName::try_from(name).unwrap(), HeaderValue::try_from(value).unwrap());
        }
    }

    async fn line(&mut self) -> io::Result<String> {
        loop {
            if let Some(end) = self.read.windows(2).position(|two| two == b"\r\n") {
                let line = self.read.split_to(end);
                self.read.advance(2);
                return Ok(String::from_utf8(line.to_vec()).unwrap());
            }
            self.some().await?;
        }
    }

    async fn some(&mut self) -> io::Result<()> {
        match self.more().await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }

    async fn more(&mut self) -> io::Result<usize> {
        timeout(WAIT, self.stream.read_buf(&mut self.read)).await.expect("a server that writes or closes")
    }
}

impl Told {
    pub fn is_replayed(&self) -> bool {
        self.headers.get("idempotent-replayed").is_some_and(|value| value == "true")
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    /// The code of a refusal.
    pub fn code(&self) -> String {
        let problem: serde_json::Value = serde_json::from_slice(&self.body).expect("a problem document");
        problem["code"].as_str().unwrap().to_owned()
    }
}
