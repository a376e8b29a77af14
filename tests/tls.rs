//! The Redis store by TLS, on servers that listen for nothing else.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]

mod common;

use std::time::Duration;
use std::{env, fs};

use bytes::Bytes;
use redis::aio::MultiplexedConnection;
use redis::{Client, ConnectionInfo, IntoConnectionInfo as _, TlsCertificates};
use rustls::crypto::ring;
use tokio::process::Command;
use tokio::time::timeout;
use tower_idempotency::key::{Key, header};
use tower_idempotency::store::{Claim, Claimed, Hold, Store as _};
use tower_idempotency::{IdempotencyLayer, Ledger, RedisStore};

use common::app::{App, counting, event};
use common::redis::RedisServer;
use common::scratch::Scratch;
use common::until;

const LONG: Duration = Duration::from_secs(60);

/// Names the server to the process that a test starts for itself.
const URL: &str = "TLS_TEST_URL";

/// A certificate that vouches for itself.
struct Certificate {
    directory: Scratch,
    pem: Vec<u8>,
}

/// A server, and what its clients have to trust.
struct Secured {
    server: RedisServer,
    certificate: Certificate,
}

impl Certificate {
    fn of(host: &str) -> Self {
        let made = rcgen::generate_simple_self_signed([host.to_owned()]).unwrap();
        let pem = made.cert.pem().into_bytes();
        let certificate = Self { directory: Scratch::new(), pem };
        fs::write(certificate.path("cert.pem"), &certificate.pem).unwrap();
        fs::write(certificate.path("key.pem"), made.signing_key.serialize_pem()).unwrap();
        certificate
    }

    fn path(&self, file: &str) -> String {
        self.directory.path().join(file).into_os_string().into_string().unwrap()
    }

    /// A client that trusts it, and nothing else.
    fn client(&self, server: ConnectionInfo) -> Client {
        let certificates = TlsCertificates { client_tls: None, root_cert: Some(self.pem.clone()) };
        Client::build_with_tls(server, certificates).unwrap()
    }
}

impl Secured {
    fn start(args: &[&str]) -> Self {
        Self::start_as("127.0.0.1", args)
    }

    fn start_as(host: &str, args: &[&str]) -> Self {
        let certificate = Certificate::of(host);
        let (cert, key) = (certificate.path("cert.pem"), certificate.path("key.pem"));
        let files = ["--tls-cert-file", &cert, "--tls-key-file", &key, "--tls-ca-cert-file", &cert];
        let args = [&files[..], &["--tls-auth-clients", "no"], args].concat();
        Self { server: RedisServer::start_with_tls(&args), certificate }
    }

    fn url(&self, user: &str) -> String {
        format!("rediss://{user}127.0.0.1:{}/", self.server.port())
    }

    fn info(&self) -> ConnectionInfo {
        self.url("").into_connection_info().unwrap()
    }

    fn client(&self) -> Client {
        install_crypto();
        self.certificate.client(self.info())
    }

    /// Does a command by a connection of its own.
    async fn command<T: redis::FromRedisValue>(&self, line: &[&str]) -> T {
        let mut connection = connect(self.client()).await.unwrap();
        redis::cmd(line[0]).arg(&line[1..]).query_async(&mut connection).await.unwrap()
    }

    /// Does a test once more, in a process that trusts the server: what is trusted, and by which cryptography, is one for the
    /// whole process.
    async fn tried_by(&self, test: &str, user: &str) {
        let mut process = Command::new(env::current_exe().unwrap());
        process.args(["--exact", test, "--nocapture"]).kill_on_drop(true);
        process.env(URL, self.url(user)).env("SSL_CERT_FILE", self.certificate.path("cert.pem"));
        let output = timeout(LONG, process.output()).await.unwrap().unwrap();
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.contains("1 passed"), "{said}");
    }

    async fn add_user(&self) {
        let () = self.command(&["ACL", "SETUSER", "app", "on", ">pass/word", "~*", "&*", "+@all"]).await;
    }
}

async fn connect(client: Client) -> redis::RedisResult<MultiplexedConnection> {
    client.get_multiplexed_async_connection().await
}

fn store(client: Client) -> RedisStore {
    RedisStore::from_factory(move || connect(client.clone()))
}

fn app(store: RedisStore) -> App {
    counting(&IdempotencyLayer::webhook(&Ledger::new(store), header("X-Id")), 200)
}

/// What a program does before it connects.
fn install_crypto() {
    // Another test may have been first.
    let _ = ring::default_provider().install_default();
}

/// A delivery is run, recorded and replayed.
async fn serves(store: RedisStore) {
    let app = app(store);
    let first = app.send(event("e")).await;
    assert_eq!((first.status.as_u16(), first.is_stored()), (200, true), "{first:?}");
    let second = app.send(event("e")).await;
    assert!(second.is_replayed());
    assert_eq!((second.body, app.runs()), (first.body, 1));
}

/// A delivery is refused, and the store says why.
async fn refuses(store: RedisStore, why: &str) {
    let error = store.claim(&Key::from([7; 24]), &Claim::new(LONG, LONG)).await.unwrap_err();
    assert!(error.is_definite() && format!("{error:?}").contains(why), "{why}: {error:?}");
    let app = app(store);
    let refused = app.send(event("e")).await;
    assert_eq!((refused.status.as_u16(), refused.code().as_deref()), (503, Some("store_unavailable")), "{why}");
    assert_eq!(app.runs(), 0);
}

/// Who waits for another process listens by TLS, too.
async fn wakes(runs: RedisStore, waits: RedisStore, client: Client) {
    let (key, claim) = (Key::from([8; 24]), Claim::new(LONG, LONG));
    assert_eq!(runs.claim(&key, &claim).await.unwrap(), Claimed::Acquired { attempt: 1 });
    let woken = tokio::spawn(async move { waits.changed(&key).await });
    let mut connection = connect(client).await.unwrap();
    until(async || {
        let list: String = redis::cmd("CLIENT").arg("LIST").query_async(&mut connection).await.unwrap();
        list.contains("subscribe ")
    })
    .await;
    assert_eq!(runs.complete(&key, &claim, Bytes::new()).await.unwrap(), Hold::Held);
    timeout(LONG, woken).await.expect("nobody was woken").unwrap();
}

#[tokio::test]
async fn a_factory_brings_its_own_certificates() {
    install_crypto();
    let secured = Secured::start(&[]);
    serves(store(secured.client())).await;
    refuses(store(Certificate::of("127.0.0.1").client(secured.info())), "invalid peer certificate").await;
}

#[tokio::test]
async fn a_connection_that_was_cut_while_idle_costs_no_request() {
    install_crypto();
    let mut secured = Secured::start(&[]);
    let app = app(store(secured.client()));
    assert_eq!(app.send(event("e")).await.status, 200);
    let _: u32 = secured.command(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]).await;
    assert!(app.send(event("e")).await.is_replayed());
    secured.server.kill();
    assert_eq!(app.send(event("e")).await.status, 503);
    secured.server.restart();
    until(async || app.send(event("e")).await.status == 200).await;
}

#[tokio::test]
async fn a_server_that_is_not_trusted_is_refused() {
    install_crypto();
    let secured = Secured::start(&[]);
    refuses(RedisStore::new(&secured.url("")).unwrap(), "invalid peer certificate").await;
    let other = Secured::start_as("redis.example.com", &[]);
    refuses(store(other.client()), "invalid peer certificate").await;
    refuses(RedisStore::new(&format!("{}#insecure", secured.url(""))).unwrap(), "insecure").await;
    let plain = RedisServer::start();
    refuses(RedisStore::new(&plain.url().replace("redis:", "rediss:")).unwrap(), "").await;
    refuses(RedisStore::new(&secured.url("").replace("rediss:", "redis:")).unwrap(), "").await;
}

#[tokio::test]
async fn a_user_is_known_by_password() {
    install_crypto();
    let secured = Secured::start(&[]);
    secured.add_user().await;
    let () = secured.command(&["CONFIG", "SET", "requirepass", "other"]).await;
    let as_user = |password: &str| {
        let settings = secured.info().redis_settings().clone().set_username("app").set_password(password);
        store(secured.certificate.client(secured.info().set_redis_settings(settings)))
    };
    serves(as_user("pass/word")).await;
    refuses(as_user("wrong"), "authentication failed").await;
    refuses(store(secured.client()), "NOAUTH").await;
}

#[tokio::test]
async fn a_url_finds_what_the_system_trusts() {
    let Ok(url) = env::var(URL) else {
        let secured = Secured::start(&[]);
        secured.add_user().await;
        return secured.tried_by("a_url_finds_what_the_system_trusts", "app:pass%2Fword@").await;
    };
    install_crypto();
    let store = || RedisStore::new(&url).unwrap();
    serves(store()).await;
    wakes(store(), store(), Client::open(&*url).unwrap()).await;
}

#[tokio::test]
async fn a_cluster_finds_its_nodes_by_tls() {
    let Ok(url) = env::var(URL) else {
        let secured = Secured::start(&["--cluster-enabled", "yes", "--tls-cluster", "yes"]);
        let () = secured.command(&["CLUSTER", "ADDSLOTSRANGE", "0", "16383"]).await;
        until(async || secured.command::<String>(&["CLUSTER", "INFO"]).await.contains("cluster_state:ok")).await;
        return secured.tried_by("a_cluster_finds_its_nodes_by_tls", "").await;
    };
    install_crypto();
    let store = || RedisStore::cluster(&[&url]).unwrap();
    serves(store()).await;
    wakes(store(), store(), Client::open(&*url).unwrap()).await;
}

#[tokio::test]
async fn without_crypto_nothing_runs_until_there_is_some() {
    let Ok(url) = env::var(URL) else {
        return Secured::start(&[]).tried_by("without_crypto_nothing_runs_until_there_is_some", "").await;
    };
    // The client panics; the store does not.
    let store = RedisStore::new(&url).unwrap();
    refuses(store.clone(), "CryptoProvider::install_default").await;
    install_crypto();
    let app = app(store);
    until(async || app.send(event("e")).await.status == 200).await;
}
