//! The app as a process of its own, which can be killed and frozen where it stands.

use std::env;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;

use futures_util::future;
use http_body_util::BodyExt as _;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, stdin};
use tokio::net::TcpListener;
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::watch;
use tower_idempotency::RedisStore;

use crate::app::{Progress, Settings, app};
use crate::common::app::App;
use crate::common::{mortal, signal};
use crate::effects::{Effects, Place};

/// With this in its environment, the test is an app.
const SETUP: &str = "EXPERIMENT_APP";

#[derive(Deserialize, Serialize)]
struct Setup {
    url: String,
    dir: PathBuf,
    place: Place,
    settings: Settings,
}

/// What the app has to tell, line by line.
#[derive(Deserialize, Serialize)]
enum Line {
    Listens(SocketAddr),
    Progress(Progress),
}

/// A running app, killed when dropped.
pub struct Process {
    pub addr: SocketAddr,
    child: Child,
    stdin: ChildStdin,
    progress: watch::Receiver<Progress>,
}

// === impl Process ===

impl Process {
    pub async fn start(url: &str, dir: PathBuf, place: Place, settings: Settings) -> Self {
        let setup = serde_json::to_string(&Setup { url: url.to_owned(), dir, place, settings }).unwrap();
        let mut command = Command::from(mortal(env::current_exe().unwrap().to_str().unwrap()));
        command.env(SETUP, setup).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let first = lines.next_line().await.unwrap().expect("it to start");
        let Line::Listens(addr) = serde_json::from_str(&first).unwrap() else { panic!("it does not listen: {first}") };
        let (sender, progress) = watch::channel(Progress::default());
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                if let Line::Progress(progress) = serde_json::from_str(&line).unwrap() {
                    sender.send_replace(progress);
                }
            }
        });
        Self { addr, stdin: child.stdin.take().unwrap(), child, progress }
    }

    pub async fn kill(&mut self) {
        self.child.kill().await.unwrap();
    }

    /// Stops it where it stands, all its threads.
    pub fn freeze(&self) {
        signal(self.child.id().unwrap(), "STOP");
    }

    pub fn thaw(&self) {
        signal(self.child.id().unwrap(), "CONT");
    }

    /// Lets go of the runs that have stopped.
    pub async fn open(&mut self) {
        self.stdin.write_all(b"\n").await.unwrap();
    }

    /// Returns when its runs have come so far.
    pub async fn reached(&mut self, has: impl FnMut(&Progress) -> bool) {
        self.progress.wait_for(has).await.expect("it to go on");
    }
}

// The other side.

/// What this process is to be, if it is an app.
pub fn setup() -> Option<String> {
    env::var(SETUP).ok()
}

/// Serves until it is killed.
#[allow(clippy::print_stdout, reason = "its parent reads it")]
pub async fn serve(setup: &str) {
    let Setup { url, dir, place, settings } = serde_json::from_str(setup).unwrap();
    let (app, stop) = app(RedisStore::new(&url).unwrap(), &Effects::open(&dir, place), &settings);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("{}", serde_json::to_string(&Line::Listens(listener.local_addr().unwrap())).unwrap());
    let mut progress = stop.progress.subscribe();
    let telling = async {
        while progress.changed().await.is_ok() {
            let line = Line::Progress(*progress.borrow_and_update());
            println!("{}", serde_json::to_string(&line).unwrap());
        }
    };
    let opening = async {
        if let Ok(Some(_)) = BufReader::new(stdin()).lines().next_line().await {
            stop.open();
        }
        future::pending().await
    };
    tokio::select! {
        () = accept(listener, app) => {}
        () = telling => {}
        () = opening => {}
    }
}

async fn accept(listener: TcpListener, app: App) {
    while let Ok((stream, _)) = listener.accept().await {
        let app = app.clone();
        let service = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
            app.call(request.map(|body| body.map_err(std::io::Error::other).boxed_unsync()))
        });
        let mut server = http2::Builder::new(TokioExecutor::new());
        // As many duplicates at once as anybody likes.
        server.max_concurrent_streams(None);
        tokio::spawn(server.serve_connection(TokioIo::new(stream), service));
    }
}
