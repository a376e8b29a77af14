//! A proxy between a store and its server, for what a network does to connections.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// Passes bytes on, unless told otherwise.
pub struct Proxy {
    port: u16,
    faults: Arc<Faults>,
}

#[derive(Default)]
struct Faults {
    target: AtomicU16,
    connections: AtomicUsize,
    /// Connections up to this one swallow whatever they are sent.
    swallowing: AtomicUsize,
    /// The next answer is lost, with its connection.
    cut_next_answer: AtomicBool,
    /// Instead of passing requests on, answers that the server is loading.
    loading: AtomicBool,
}

impl Proxy {
    pub async fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let faults = Arc::new(Faults::default());
        faults.target.store(port, Ordering::SeqCst);
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
        self.faults.cut_next_answer.store(true, Ordering::SeqCst);
    }

    pub fn loading(&self, loading: bool) {
        self.faults.loading.store(loading, Ordering::SeqCst);
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
                let cut = is_step && faults.cut_next_answer.swap(false, Ordering::SeqCst);
                if is_step && !cut && faults.loading.load(Ordering::SeqCst) {
                    let loading = b"-LOADING Redis is loading the dataset in memory\r\n";
                    if to_client.write_all(loading).await.is_err() {
                        return;
                    }
                    continue;
                }
                if to_server.write_all(request).await.is_err() {
                    return;
                }
                if cut {
                    let _ = from_server.read(&mut answers).await;
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

fn contains(bytes: &[u8], what: &[u8]) -> bool {
    bytes.windows(what.len()).any(|window| window == what)
}
