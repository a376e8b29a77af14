//! The model's server is what the stores are: whatever is done to a key, they answer the same, and the same stands there.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use redis::AsyncCommands as _;
use tokio::time::advance;
use tower_idempotency::MemoryStore;
use tower_idempotency::key::Key;
use tower_idempotency::store::{self, Claim, Claimed, Entry, Forgotten, Hold, Store};

use crate::common::redis::RedisServer;
use crate::server::{Answer, Id, Life, Record, Request, State, Step, forget, serve};

/// So long that only what is done to a key makes time pass.
const LEASE: Duration = Duration::from_secs(1_000);
const RETENTION: Duration = Duration::from_secs(100_000);

#[derive(Clone, Copy, Debug)]
enum Move {
    Claim(Id),
    Complete(Id),
    Forget { force: bool },
    GiveUp(Id),
    LeaseOver,
    LifeOver,
    Release(Id, Life),
    Renew(Id),
}

/// The first six are what there is to do to a new key: one claim is like another.
const MOVES: [Move; 16] = [
    Move::Claim(0),
    Move::Complete(0),
    Move::GiveUp(0),
    Move::Release(0, Life::Lease),
    Move::Release(0, Life::Retention),
    Move::Renew(0),
    Move::Claim(1),
    Move::Complete(1),
    Move::GiveUp(1),
    Move::Release(1, Life::Lease),
    Move::Release(1, Life::Retention),
    Move::Renew(1),
    Move::Forget { force: false },
    Move::Forget { force: true },
    Move::LeaseOver,
    Move::LifeOver,
];

/// All there is to do in four moves.
fn games() -> impl Iterator<Item = (Key, [Move; 4])> {
    (0..6 * 16 * 16 * 16_usize).map(|game| {
        let mut key = [0; 24];
        key[..8].copy_from_slice(&game.to_le_bytes());
        (Key::from(key), [game / 4096, game / 256 % 16, game / 16 % 16, game % 16].map(|index| MOVES[index]))
    })
}

/// One key in a store, and what the model makes of it.
struct Game<'a, S> {
    store: &'a S,
    key: Key,
    claims: [Claim; 2],
    model: Option<Record>,
}

impl<'a, S: Store> Game<'a, S> {
    fn new(store: &'a S, key: Key) -> Self {
        Self { store, key, claims: [(); 2].map(|()| Claim::new(LEASE, RETENTION)), model: None }
    }

    /// What both make of a move, but for those of time.
    async fn play(&mut self, next: Move) {
        let Self { store, key, claims, model } = self;
        let ask = |step, id: Id, attempt: u32, remember| Request { step, id, attempt: attempt as u8, remember };
        let (answer, expected) = match next {
            Move::Claim(id) => {
                let claimed = store.claim(key, &claims[id]).await.unwrap();
                let mut expected = serve(model, ask(Step::Claim, id, 0, Life::Lease), None);
                if expected == Answer::Undecided {
                    expected = serve(model, ask(Step::TakeOver, id, 0, Life::Lease), None);
                }
                if let Claimed::Acquired { attempt } = claimed {
                    claims[id].attempt = attempt;
                }
                (told(claimed), expected)
            }
            Move::Complete(id) => {
                let hold = store.complete(key, &claims[id], outcome(id)).await.unwrap();
                (held(hold), serve(model, ask(Step::Complete, id, claims[id].attempt, Life::Lease), None))
            }
            Move::Forget { force } => {
                let forgotten = store.forget(key, force).await.unwrap();
                assert_eq!(forgotten == Forgotten::Forgotten, forget(model, force, None));
                return;
            }
            Move::GiveUp(id) => {
                let mut claim = claims[id].clone();
                claim.attempt = 0;
                let hold = store.release(key, &claim, LEASE).await.unwrap();
                (held(hold), serve(model, ask(Step::Release, id, 0, Life::Lease), None))
            }
            Move::LeaseOver | Move::LifeOver => unreachable!("time is the store's"),
            Move::Release(id, remember) => {
                let hold = store.release(key, &claims[id], lasts(remember)).await.unwrap();
                (held(hold), serve(model, ask(Step::Release, id, claims[id].attempt, remember), None))
            }
            Move::Renew(id) => {
                let hold = store.renew(key, &claims[id]).await.unwrap();
                (held(hold), serve(model, ask(Step::Renew, id, claims[id].attempt, Life::Lease), None))
            }
        };
        assert_eq!(answer, expected);
    }

    /// How long it takes until time does what the move says, where it can.
    fn end(&mut self, next: Move) -> Option<Duration> {
        let record = self.model.as_mut()?;
        match (next, record.state) {
            (Move::LeaseOver, State::Running { alive: true }) => {
                record.state = State::Running { alive: false };
                Some(LEASE)
            }
            (Move::LifeOver, State::Done | State::Free(_) | State::Running { alive: false }) => {
                let life = if let State::Free(life) = record.state { life } else { Life::Retention };
                self.model = None;
                Some(lasts(life))
            }
            _ => None,
        }
    }

    async fn compare(&self) {
        let entry = self.store.lookup(&self.key).await.unwrap();
        assert_eq!(entry.is_some(), self.model.is_some());
        let (Some(entry), Some(record)) = (entry, self.model) else { return };
        assert_eq!(entry.attempt, u32::from(record.attempt));
        let Entry { state, expires_in, .. } = entry;
        match record.state {
            State::Done => assert_eq!(state, store::State::Done(outcome(record.id))),
            State::Free(life) => {
                assert_eq!(state, store::State::Free);
                assert_eq!(expires_in > LEASE, life == Life::Retention);
            }
            State::Running { alive } => {
                assert_eq!(state, store::State::Running);
                assert_eq!(expires_in > RETENTION, alive);
            }
        }
    }
}

/// One that is an argument of the script in Redis, and one that is staged beside it.
fn outcome(id: Id) -> Bytes {
    vec![id as u8; [1, 17 << 10][id]].into()
}

fn lasts(life: Life) -> Duration {
    if life == Life::Lease { LEASE } else { RETENTION }
}

fn held(hold: Hold) -> Answer {
    if hold == Hold::Held { Answer::Held } else { Answer::Lost }
}

fn told(claimed: Claimed) -> Answer {
    match claimed {
        Claimed::Acquired { attempt } => Answer::Acquired { attempt: attempt as u8 },
        Claimed::Done { record, .. } => Answer::Done(record[0].into()),
        Claimed::Running { .. } => Answer::Running,
        Claimed::Mismatch => unreachable!("there is no fingerprint"),
    }
}

/// Plays all games, so many at once. `pass` lets time pass for a key.
async fn agrees<S: Store>(store: &S, at_once: usize, pass: impl AsyncFn(Key, Duration)) {
    let play = async |(key, moves): (Key, [Move; 4])| {
        let mut game = Game::new(store, key);
        for next in moves {
            if !matches!(next, Move::LeaseOver | Move::LifeOver) {
                game.play(next).await;
            } else if let Some(time) = game.end(next) {
                pass(key, time).await;
            }
        }
        game.compare().await;
    };
    stream::iter(games()).for_each_concurrent(at_once, play).await;
}

#[tokio::test(start_paused = true)]
async fn the_memory_store_does_what_the_model_does() {
    agrees(&MemoryStore::new(), 1, async |_, time| advance(time).await).await;
}

#[tokio::test]
async fn the_redis_store_does_what_the_model_does() {
    let server = RedisServer::start();
    let client = server.client().await;
    let pass = async |key, time: Duration| {
        let (mut client, name) = (client.clone(), format!("idempotency:{{{key}}}"));
        let left: i64 = client.pttl(&name).await.unwrap();
        let () = client.pexpire(&name, left - time.as_millis() as i64).await.unwrap();
    };
    agrees(&server.store(), 64, pass).await;
}
