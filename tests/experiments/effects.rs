//! What the handlers do to the world, and how often they have done it.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rusqlite::{Connection, TransactionBehavior};
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;
use tower_idempotency::Attempt;

/// Where an effect is made.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Place {
    /// Where nothing knows what has been made: a line in a file.
    Outside,
    /// In a database, in one transaction with the row that says so.
    Fenced,
}

/// The world of one trial, in a directory that its processes share.
#[derive(Clone)]
pub struct Effects {
    runs: Arc<File>,
    made: Made,
}

#[derive(Clone)]
enum Made {
    Outside(Arc<File>),
    Fenced(Arc<Mutex<Connection>>),
}

impl Effects {
    pub fn open(dir: &Path, place: Place) -> Self {
        let made = match place {
            Place::Outside => Made::Outside(Arc::new(lines(&dir.join("effects")))),
            Place::Fenced => Made::Fenced(Arc::new(Mutex::new(database(&dir.join("effects.sqlite"))))),
        };
        Self { runs: Arc::new(lines(&dir.join("runs"))), made }
    }

    /// Notes that a handler was called.
    pub fn runs(&self, event: &str) {
        append(&self.runs, event);
    }

    /// Makes the effect of an event, as a user of the crate would.
    pub async fn make(&self, event: &str, attempt: &Attempt) {
        match &self.made {
            Made::Outside(file) => append(file, event),
            Made::Fenced(connection) => {
                let (connection, event, key) = (Arc::clone(connection), event.to_owned(), attempt.key().to_string());
                let made = spawn_blocking(move || make_fenced(&mut connection.lock().unwrap(), &event, &key).unwrap());
                if !made.await.unwrap() {
                    attempt.already_applied();
                }
            }
        }
    }

    /// How often each event had its effect.
    pub fn count(dir: &Path, place: Place) -> BTreeMap<String, u32> {
        match place {
            Place::Outside => count(&dir.join("effects")),
            Place::Fenced => {
                let connection = database(&dir.join("effects.sqlite"));
                let mut effects = connection.prepare("SELECT event, count(*) FROM effects GROUP BY event").unwrap();
                let rows = effects.query_map((), |row| Ok((row.get(0)?, row.get::<_, u32>(1)?))).unwrap();
                rows.map(Result::unwrap).collect()
            }
        }
    }

    /// How often each event was run.
    pub fn count_runs(dir: &Path) -> BTreeMap<String, u32> {
        count(&dir.join("runs"))
    }
}

/// Whether it was made now, and not before.
fn make_fenced(connection: &mut Connection, event: &str, key: &str) -> rusqlite::Result<bool> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let is_first = transaction.execute("INSERT OR IGNORE INTO seen (key) VALUES (?1)", [key])? == 1;
    if is_first {
        transaction.execute("INSERT INTO effects (event) VALUES (?1)", [event])?;
    }
    transaction.commit()?;
    Ok(is_first)
}

fn database(path: &Path) -> Connection {
    let connection = Connection::open(path).unwrap();
    connection.busy_timeout(Duration::from_secs(20)).unwrap();
    // Processes are killed here, not the machine: what was written need not be on the disk.
    let schema = "PRAGMA journal_mode = WAL; PRAGMA synchronous = OFF;
        CREATE TABLE IF NOT EXISTS seen (key TEXT PRIMARY KEY);
        CREATE TABLE IF NOT EXISTS effects (event TEXT NOT NULL);";
    connection.execute_batch(schema).unwrap();
    connection
}

fn lines(path: &Path) -> File {
    OpenOptions::new().create(true).append(true).open(path).unwrap()
}

/// In one call, so that the lines of several processes do not mix.
fn append(mut file: &File, event: &str) {
    file.write_all(format!("{event}\n").as_bytes()).unwrap();
}

fn count(path: &Path) -> BTreeMap<String, u32> {
    let mut counts = BTreeMap::new();
    for event in fs::read_to_string(path).unwrap().lines() {
        *counts.entry(event.to_owned()).or_default() += 1;
    }
    counts
}
