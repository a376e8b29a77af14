//! The server, a process of its own, so that what its clients hold is not counted.

use std::alloc::System;
use std::env;
use std::io;
use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::Arc;

use http_body_util::BodyExt as _;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use peakmem_alloc::{INSTRUMENTED_SYSTEM, PeakMemAlloc, PeakMemAllocTrait as _};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines, stdin};
use tokio::net::TcpListener;
use tokio::process::{Child, ChildStdout, Command};
use tokio::sync::Barrier;
use tower_idempotency::{IdempotencyLayer, Ledger, MemoryStore, key};

use super::AT_ONCE;
use super::common::app::{App, Incoming, answer};
use super::common::mortal;

/// With this in its environment, the benchmark is the server.
const SETUP: &str = "MEMORY_SERVER";

/// What the server is to be.
#[derive(Clone, Copy, Deserialize, Serialize)]
pub struct Setup {
    pub layered: bool,
    /// How large hyper's buffer of a connection may grow; by itself to 408 KiB.
    pub max_buffer: Option<usize>,
}

#[global_allocator]
static ALLOCATOR: &PeakMemAlloc<System> = &INSTRUMENTED_SYSTEM;

/// A running server, killed when dropped.
pub struct Server {
    pub addr: SocketAddr,
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Server {
    pub async fn start(setup: Setup) -> Self {
        let mut command = Command::from(mortal(env::current_exe().unwrap()));
        command
            .env(SETUP, serde_json::to_string(&setup).unwrap())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let addr = lines.next_line().await.unwrap().expect("it to start").parse().unwrap();
        Self { addr, child, lines }
    }

    /// Ends it, and tells how many bytes it held at most.
    pub async fn peak(mut self) -> usize {
        self.child.stdin.take().unwrap().shutdown().await.unwrap();
        self.lines.next_line().await.unwrap().expect("it to tell").parse().unwrap()
    }
}

// The other side.

/// What this process is to be, if it is the server.
pub fn setup() -> Option<Setup> {
    env::var(SETUP).ok().map(|setup| serde_json::from_str(&setup).unwrap())
}

/// Serves until its input ends.
pub async fn serve(setup: Setup) {
    let ledger = Ledger::new(MemoryStore::new());
    let layer = IdempotencyLayer::webhook(&ledger, key::json("$.id")).enabled(setup.layered);
    let all = Arc::new(Barrier::new(AT_ONCE));
    let app = App::new(&layer, move |request: Incoming, _| {
        let all = Arc::clone(&all);
        async move {
            let body = request.into_body().collect().await?.to_bytes();
            all.wait().await;
            answer(200, format!("{} bytes", body.len()))
        }
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("{}", listener.local_addr().unwrap());
    ALLOCATOR.reset_peak_memory();
    let mut input = BufReader::new(stdin()).lines();
    tokio::select! {
        () = accept(listener, app, setup.max_buffer) => {}
        _ = input.next_line() => println!("{}", ALLOCATOR.get_peak_memory()),
    }
}

async fn accept(listener: TcpListener, app: App, max_buffer: Option<usize>) {
    while let Ok((stream, _)) = listener.accept().await {
        let app = app.clone();
        let service = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
            app.call(request.map(|body| body.map_err(io::Error::other).boxed_unsync()))
        });
        let mut server = auto::Builder::new(TokioExecutor::new());
        if let Some(bytes) = max_buffer {
            server.http1().max_buf_size(bytes);
        }
        tokio::spawn(server.serve_connection(TokioIo::new(stream), service).into_owned());
    }
}
