//! A PostgreSQL server of the tests' own.

use std::env;
use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use sqlx::postgres::{PgPool, PgPoolOptions};
use tower_idempotency::PostgresStore;

use super::{signal, through_setpriv, until};

/// PostgreSQL does not run as root, so then it is nobody's.
const NOBODY: u32 = 65534;

/// A server in a directory of its own, which does not care for its disk unless it is told to; ended when dropped.
pub struct PostgresServer {
    child: Child,
    port: u16,
    dir: PathBuf,
    setting: &'static str,
    _parent: Sender<()>,
}

static SHARED: Mutex<Weak<PostgresServer>> = Mutex::new(Weak::new());

impl PostgresServer {
    /// The server of all tests that run at the moment: one takes a second to make.
    pub fn shared() -> Arc<Self> {
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(server) = shared.upgrade() {
            return server;
        }
        let server = Arc::new(Self::start());
        *shared = Arc::downgrade(&server);
        server
    }

    pub fn start() -> Self {
        Self::start_with("fsync=off")
    }

    /// As one has it who cares: what is committed is on the disk.
    pub fn durable() -> Self {
        Self::start_with("fsync=on")
    }

    fn start_with(setting: &'static str) -> Self {
        // Where nobody may go: the directory of the tests may be root's.
        let dir = env::temp_dir().join(format!("idempotency-postgres-{:016x}", rand::random::<u64>()));
        fs::create_dir(&dir).expect("a directory");
        if is_root() {
            chown(&dir, Some(NOBODY), Some(NOBODY)).expect("a directory that is nobody's");
        }
        let data = dir.join("data");
        let made = program("initdb")
            .args(["--username=test", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C", "--pgdata"])
            .arg(&data)
            .stdout(Stdio::null())
            .status()
            .expect("initdb: ./tests/run installs it");
        assert!(made.success(), "initdb fails");
        let port = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port();
        let (child, parent) = run(&data, port, setting);
        Self { child, port, dir, setting, _parent: parent }
    }

    /// Stops it at once, as in a crash.
    pub fn stop(&mut self) {
        // What is killed leaves shared memory behind.
        signal(self.child.id(), "QUIT");
        let _ = self.child.wait();
    }

    /// Starts what was stopped, with what it had.
    pub fn start_again(&mut self) {
        (self.child, self._parent) = run(&self.dir.join("data"), self.port, self.setting);
    }

    pub fn url(&self) -> String {
        format!("postgres://test@127.0.0.1:{}/postgres", self.port)
    }

    /// Connections to it, as soon as it takes them.
    pub async fn pool(&self) -> PgPool {
        let options = PgPoolOptions::new().max_connections(8).acquire_timeout(Duration::from_secs(30));
        let pool = options.connect_lazy(&self.url()).expect("a URL");
        until(async || sqlx::query("SELECT 1").execute(&pool).await.is_ok()).await;
        pool
    }

    /// A store in a table of its own.
    pub async fn store(&self) -> PostgresStore {
        self.pool().await;
        let store = PostgresStore::open(&self.url())
            .expect("a URL")
            .table(&format!("idempotency_{:016x}", rand::random::<u64>()));
        let store = store.expect("a name");
        store.migrate().await.expect("a table");
        store
    }
}

impl Drop for PostgresServer {
    fn drop(&mut self) {
        self.stop();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Starts a server, with what keeps it.
fn run(data: &Path, port: u16, setting: &str) -> (Child, Sender<()>) {
    let mut command = program("postgres");
    command.arg("-D").arg(data).arg("-p").arg(port.to_string());
    for setting in [setting, "listen_addresses=127.0.0.1", "max_connections=200", "unix_socket_directories="] {
        command.args(["-c", setting]);
    }
    command.stdout(Stdio::null()).stderr(Stdio::null());
    // It does not outlive the thread that starts it, and a test that is done is one that ends.
    let (parent, is_over) = channel();
    let (started, child) = channel();
    thread::spawn(move || {
        let _ = started.send(command.spawn());
        let _: Result<(), _> = is_over.recv();
    });
    (child.recv().expect("a thread").expect("postgres: ./tests/run installs it"), parent)
}

/// One of its programs, which does not outlive a test that is killed.
fn program(name: &str) -> Command {
    let nobody = NOBODY.to_string();
    let mut settings = vec!["--pdeathsig", "QUIT"];
    if is_root() {
        settings.extend(["--reuid", &nobody, "--regid", &nobody, "--clear-groups"]);
    }
    let mut command = through_setpriv(path(name), &settings);
    command.current_dir("/");
    command
}

fn is_root() -> bool {
    let id = Command::new("id").arg("-u").output().expect("id");
    id.stdout.trim_ascii() == b"0"
}

/// Debian keeps them off the path, by version.
fn path(name: &str) -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let installed = versions.map(|version| version.path().join("bin").join(name)).filter(|path| path.exists()).max();
    installed.unwrap_or_else(|| Path::new(name).to_owned())
}
