//! A proxy between a store and its server, for what a network does to connections.

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Passes bytes on, unless told otherwise.
pub struct Proxy {
    port: u16,
    faults: Arc<Faults>,
}

/// How an answer is lost. A network loses no answer and delivers the next.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Loss {
    /// The connection ends.
    Cut,
    /// The connection stays, and nothing comes out of it any more.
    Silence,
}

struct Faults {
    target: AtomicU16,
    connections: AtomicUsize,
    /// Connections up to this one swallow whatever they are sent.
    swallowing: AtomicUsize,
    /// Of the steps yet to come, whose answer is lost.
    losing: Mutex<Option<(usize, Loss)>>,
    /// The steps whose answers were lost.
    lost: Mutex<Vec<String>>,
    /// Instead of passing requests on, answers that the server is loading.
    loading: AtomicBool,
    /// A connection that is sent this stops there.
    freezing: watch::Sender<Option<&'static str>>,
    frozen: AtomicUsize,
}

impl Proxy {
    pub async fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let faults = Arc::new(Faults::to(port));
        let port = listener.local_addr().expect("a bound socket").port();
        let shared = Arc::clone(&faults);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let number = shared.connections.fetch_add(1, Ordering::SeqCst) + 1;
                tokio::spawn(pass(client, number, Arc::clone(&shared)));
            }
        });
        Self { port, faults }
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/", self.port)
    }

    pub fn connections(&self) -> usize {
        self.faults.connections.load(Ordering::SeqCst)
    }

    /// New connections lead to another server; those there are stay.
    pub fn retarget(&self, port: u16) {
        self.faults.target.store(port, Ordering::SeqCst);
    }

    /// The connections there are swallow whatever they are sent; new ones work.
    pub fn black_hole(&self) {
        self.faults.swallowing.store(self.connections(), Ordering::SeqCst);
    }

    /// The next request is done; its answer is lost, with the connection.
    pub fn cut_next_answer(&self) {
        self.lose_answer(1, Loss::Cut);
    }

    /// The nth request from here on is done, and its answer is lost.
    pub fn lose_answer(&self, nth: usize, loss: Loss) {
        *self.faults.losing.lock().unwrap() = Some((nth, loss));
    }

    /// What was asked for in the requests whose answers were lost: `SET`, or how a script was called, and its hash.
    pub fn lost(&self) -> Vec<String> {
        self.faults.lost.lock().unwrap().clone()
    }

    pub fn loading(&self, loading: bool) {
        self.faults.loading.store(loading, Ordering::SeqCst);
    }

    /// Connections stop where they are sent this, until they are thawed.
    pub fn freeze_at(&self, what: &'static str) {
        self.faults.freezing.send_replace(Some(what));
    }

    /// How many connections are frozen.
    pub fn frozen(&self) -> usize {
        self.faults.frozen.load(Ordering::SeqCst)
    }

    pub fn thaw(&self) {
        self.faults.freezing.send_replace(None);
    }
}

impl Faults {
    fn to(port: u16) -> Self {
        Self {
            target: AtomicU16::new(port),
            connections: AtomicUsize::default(),
            swallowing: AtomicUsize::default(),
            losing: Mutex::default(),
            lost: Mutex::default(),
            loading: AtomicBool::default(),
            freezing: watch::Sender::default(),
            frozen: AtomicUsize::default(),
        }
    }

    /// Whether the answer to this step is lost, and how.
    fn loses(&self, request: &[u8]) -> Option<Loss> {
        let mut losing = self.losing.lock().unwrap();
        let (left, loss) = (*losing)?;
        *losing = (left > 1).then_some((left - 1, loss));
        if left > 1 {
            return None;
        }
        self.lost.lock().unwrap().push(name(request));
        Some(loss)
    }

    /// Stands still as long as it is frozen.
    async fn freeze(&self, request: &[u8]) {
        let mut freezing = self.freezing.subscribe();
        let here = |what: &Option<&str>| what.is_some_and(|what| contains(request, what.as_bytes()));
        if here(&freezing.borrow()) {
            self.frozen.fetch_add(1, Ordering::SeqCst);
            let _ = freezing.wait_for(|what| !here(what)).await;
            self.frozen.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

async fn pass(client: TcpStream, number: usize, faults: Arc<Faults>) {
    let target = faults.target.load(Ordering::SeqCst);
    let Ok(server) = TcpStream::connect(("127.0.0.1", target)).await else { return };
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let (mut requests, mut answers) = (vec![0; 64 << 10], vec![0; 64 << 10]);
    loop {
        tokio::select! {
            read = from_client.read(&mut requests) => {
                let Ok(length @ 1..) = read else { return };
                let request = &requests[..length];
                // What a new connection asks first is not what the faults are for.
                let is_step = [&b"\r\nSET\r\n"[..], b"\r\nEVAL"].iter().any(|step| contains(request, step));
                if number <= faults.swallowing.load(Ordering::SeqCst) {
                    continue;
                }
                faults.freeze(request).await;
                let loss = if is_step { faults.loses(request) } else { None };
                if is_step && loss.is_none() && faults.loading.load(Ordering::SeqCst) {
                    let loading = b"-LOADING Redis is loading the dataset in memory\r\n";
                    if to_client.write_all(loading).await.is_err() {
                        return;
                    }
                    continue;
                }
                if to_server.write_all(request).await.is_err() {
                    return;
                }
                if let Some(loss) = loss {
                    let _ = from_server.read(&mut answers).await;
                    if loss == Loss::Silence {
                        swallow(from_client, to_server, requests).await;
                    }
                    return;
                }
            }
            read = from_server.read(&mut answers) => {
                let Ok(length @ 1..) = read else { return };
                if to_client.write_all(&answers[..length]).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// Passes requests on and no answers back, until the client has had enough.
async fn swallow(mut from_client: OwnedReadHalf, mut to_server: OwnedWriteHalf, mut requests: Vec<u8>) {
    while let Ok(length @ 1..) = from_client.read(&mut requests).await {
        if to_server.write_all(&requests[..length]).await.is_err() {
            return;
        }
    }
}

/// The name of the step, and of a script its hash. Other commands may come with it.
fn name(request: &[u8]) -> String {
    let text = String::from_utf8_lossy(request);
    let words = text.split("\r\n").filter(|word| !word.starts_with(['*', '$']));
    let mut words = words.skip_while(|word| !["SET", "EVAL", "EVALSHA"].contains(word));
    match (words.next().unwrap_or_default(), words.next().unwrap_or_default()) {
        (command @ "EVAL", code) => format!("{command} {}", redis::Script::new(code).get_hash()),
        (command @ "EVALSHA", hash) => format!("{command} {hash}"),
        (command, _) => command.to_owned(),
    }
}

fn contains(bytes: &[u8], what: &[u8]) -> bool {
    bytes.windows(what.len()).any(|window| window == what)
}
