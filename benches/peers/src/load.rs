//! Clients that send orders, each on a connection of its own, the next as soon as the last is answered.

use std::fmt::{self, Display};
use std::net::Ipv4Addr;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::Instant;

/// An order as a client of an API sends it.
const ORDER: &str = r#"{"order_id":"0123456789","amount":4200,"currency":"EUR","customer":{"id":"c-1","email":"a@example.com"},"lines":[{"sku":"a-1","quantity":2},{"sku":"b-7","quantity":1},{"sku":"c-9","quantity":4}]}"#;

/// How many keys a connection repeats.
const REPEATED: u64 = 16;

/// Which keys the requests have.
#[derive(Clone, Copy, Eq, PartialEq)]
pub enum Mode {
    /// A new one each.
    New,
    /// One that was answered before.
    Duplicate,
    /// Each one twice, in a row.
    Half,
}

#[derive(Clone, Copy)]
pub enum Until {
    After(Duration),
    /// So many requests on each connection.
    Each(u64),
}

/// Whom a load goes to.
#[derive(Clone, Copy)]
pub struct Target {
    pub port: u16,
    /// Whether a client has to ask for a session first.
    pub signs_in: bool,
}

pub struct Load {
    clients: Vec<Client>,
    mode: Mode,
}

/// What came of a load.
pub struct Answered {
    pub seconds: f64,
    /// In the order from the least.
    pub latencies: Vec<Duration>,
}

pub struct Client {
    stream: TcpStream,
    received: Vec<u8>,
    cookie: String,
    keys: String,
    sent: u64,
}

// === impl Mode ===

impl Mode {
    pub const ALL: [Self; 3] = [Self::New, Self::Duplicate, Self::Half];

    fn key(self, sent: u64) -> u64 {
        match self {
            Self::New => sent,
            Self::Duplicate => sent % REPEATED,
            Self::Half => sent / 2,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Duplicate => "duplicate",
            Self::Half => "half",
        }
    }

    pub fn title(self) -> &'static str {
        match self {
            Self::New => "first deliveries",
            Self::Duplicate => "duplicates",
            Self::Half => "each key twice, in a row",
        }
    }
}

impl Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Mode {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|mode| mode.name() == name).with_context(|| format!("no mode is named {name}"))
    }
}

// === impl Load ===

impl Load {
    /// Connects, and sees to it that duplicates are such. No other load may have the same `tag`.
    pub async fn connect(target: Target, mode: Mode, connections: usize, tag: &str) -> Result<Self> {
        let mut clients = Vec::with_capacity(connections);
        for number in 0..connections {
            clients.push(Client::connect(target, format!("{tag}-{number:03}")).await?);
        }
        let mut load = Self { clients, mode };
        if mode == Mode::Duplicate {
            load.send(Until::Each(REPEATED)).await?;
        }
        Ok(load)
    }

    pub async fn send(&mut self, until: Until) -> Result<Answered> {
        let started = Instant::now();
        let mode = self.mode;
        let sending: Vec<_> =
            self.clients.drain(..).map(|client| tokio::spawn(client.send(mode, started, until))).collect();
        let mut latencies = Vec::new();
        for sent in sending {
            let (client, took) = sent.await??;
            self.clients.push(client);
            latencies.extend(took);
        }
        let seconds = started.elapsed().as_secs_f64();
        latencies.sort_unstable();
        Ok(Answered { seconds, latencies })
    }
}

// === impl Answered ===

impl Answered {
    pub fn requests(&self) -> f64 {
        self.latencies.len() as f64
    }

    /// The latency in microseconds that this part of the requests did not exceed.
    pub fn percentile(&self, part: f64) -> Result<f64> {
        let last = self.latencies.len().checked_sub(1).context("nothing was answered")?;
        Ok(self.latencies[(last as f64 * part) as usize].as_secs_f64() * 1e6)
    }
}

// === impl Client ===

impl Client {
    pub async fn connect(target: Target, keys: String) -> Result<Self> {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, target.port)).await?;
        stream.set_nodelay(true)?;
        let mut client = Self { stream, received: vec![0; 8192], cookie: String::new(), keys, sent: 0 };
        if target.signs_in {
            let request = "POST /session HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n";
            client.stream.write_all(request.as_bytes()).await?;
            let (head, _) = client.answer().await?;
            let cookie = header(head, "set-cookie").and_then(|cookie| cookie.split(';').next());
            client.cookie = format!("cookie: {}\r\n", cookie.context("no session")?);
        }
        Ok(client)
    }

    async fn send(mut self, mode: Mode, started: Instant, until: Until) -> Result<(Self, Vec<Duration>)> {
        let mut latencies = Vec::new();
        let mut now = Instant::now();
        while match until {
            Until::After(duration) => now - started < duration,
            Until::Each(requests) => (latencies.len() as u64) < requests,
        } {
            let key = mode.key(self.sent);
            self.sent += 1;
            self.order(key).await?;
            let answered = Instant::now();
            latencies.push(answered - now);
            now = answered;
        }
        Ok((self, latencies))
    }

    /// Sends an order under a key of this client's, and returns the invoice.
    pub async fn order(&mut self, key: u64) -> Result<&str> {
        let request = format!(
            "POST /orders HTTP/1.1\r\nhost: localhost\r\nidempotency-key: {}-{key:08}\r\n{}content-type: application/json\r\ncontent-length: {}\r\n\r\n{ORDER}",
            self.keys,
            self.cookie,
            ORDER.len()
        );
        self.stream.write_all(request.as_bytes()).await?;
        Ok(self.answer().await?.1)
    }

    /// The head and the body of a response, which must be 2xx.
    async fn answer(&mut self) -> Result<(&str, &str)> {
        let mut filled = 0;
        loop {
            ensure!(filled < self.received.len(), "a response of more than {filled} bytes");
            let read = self.stream.read(&mut self.received[filled..]).await?;
            ensure!(read != 0, "the server has closed the connection");
            filled += read;
            let received = &self.received[..filled];
            let Some(end) = received.windows(4).position(|window| window == b"\r\n\r\n") else { continue };
            let head = str::from_utf8(&received[..end])?;
            if !head.starts_with("HTTP/1.1 2") {
                let status = head.lines().next().unwrap_or_default();
                bail!("{status}: {}", String::from_utf8_lossy(&received[end..]).trim());
            }
            let length: usize = header(head, "content-length").context("a body without a length")?.parse()?;
            if filled >= end + 4 + length {
                let (head, body) = self.received[..end + 4 + length].split_at(end + 4);
                return Ok((str::from_utf8(head)?, str::from_utf8(body)?));
            }
        }
    }
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let mut fields = head.lines().filter_map(|line| line.split_once(':'));
    fields.find(|(field, _)| field.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
}
