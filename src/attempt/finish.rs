//! What becomes of an outcome: it is stored, then told; or the key is given back.

use std::pin::{Pin, pin};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::future::join;
use http::header::HeaderValue;
use http::{Response, response};

use super::{Client, Pursued, Reply, Run, Told};
use crate::body::ResponseBody;
use crate::flight::{Landing, Lead};
use crate::kept::{IDEMPOTENCY_EXPIRES, IDEMPOTENCY_STORED, IDEMPOTENT_REPLAYED};
use crate::ledger::Known;
use crate::near::AsOf;
use crate::policy::Contract;
use crate::record::Record;
use crate::rejection::Rejection;
use crate::sync::lock;
use crate::telemetry::{self, Executed, Outcome, Timer};
use crate::terms::Terms;
use crate::within::within;

impl Run {
    /// Stores the outcome, then answers.
    pub(super) fn complete<R, E>(
        &self,
        record: Bytes,
        response: Told<R>,
        mut client: Client<R, E>,
        executed: Executed,
    ) -> Pin<Box<impl Future<Output = ()>>> {
        Box::pin(async move {
            if self.is_withdrawn() {
                let reply = Reply::Response(unstored(response));
                return Box::pin(self.release(self.terms.lease, Some(reply), client, Executed::Released)).await;
            }
            let tell = async |pursued| {
                client.reply(Reply::Response(match pursued {
                    Pursued::Held => response,
                    Pursued::Lost => Box::pin(self.of_the_winner(response)).await,
                    Pursued::Unanswered => unstored(response),
                }));
            };
            let pursued = self.settle(record, tell).await;
            client.close(executed, pursued);
        })
    }

    /// Pursues the completion. Tells what came of it, at the latest when the response may wait no longer.
    pub(super) async fn settle(&self, record: Bytes, tell: impl AsyncFnOnce(Pursued)) -> Pursued {
        let as_of = self.lease.ledger().near().as_of();
        let mut pursuit = pin!(self.pursue(&record));
        let in_time = within(self.terms.complete_wait, pursuit.as_mut());
        if let Some(pursued) = in_time.spared_until(self.lease.ledger().call_timeout()).await {
            self.end(pursued, &record, as_of);
            tell(pursued).await;
            return pursued;
        }
        // Those who wait are told when it is stored, however long it takes to tell the client.
        let ended = async {
            let pursued = pursuit.await;
            self.end(pursued, &record, as_of);
            pursued
        };
        Box::pin(join(ended, tell(Pursued::Unanswered))).await.0
    }

    /// How long the outcome is kept.
    fn retention(&self) -> Duration {
        self.handle.steering().keep_for.unwrap_or(self.terms.retention)
    }

    /// Says when the outcome will be forgotten, where that is to be said.
    pub(super) fn announce_expiry(&self, head: &mut response::Parts) {
        if self.terms.expires_header {
            let expires = httpdate::fmt_http_date(SystemTime::now() + self.retention());
            if let Ok(expires) = HeaderValue::try_from(expires) {
                head.headers.insert(IDEMPOTENCY_EXPIRES, expires);
            }
        }
    }

    /// Completes the claim. Who was told that it lost does not complete any more.
    async fn pursue(&self, record: &Bytes) -> Pursued {
        let timer = Timer::start();
        let pursued = tokio::select! {
            biased;
            () = self.handle.lost() => Pursued::Lost,
            pursued = self.lease.complete(record, self.retention(), self.terms.complete_ceiling) => pursued,
        };
        telemetry::pursued(self.terms.contract, timer, pursued);
        pursued
    }

    /// Gives the key back, then answers.
    pub(super) async fn release<R, E>(
        &self,
        remember: Duration,
        reply: Option<Reply<R, E>>,
        mut client: Client<R, E>,
        executed: Executed,
    ) {
        self.lease.begin();
        self.stop_renewals();
        // Taken first: a renewal that crosses the release is told that it lost, and would step down.
        let lead = self.take_lead();
        let mut release = pin!(self.lease.release(remember));
        let in_time = within(self.lease.ledger().call_timeout(), release.as_mut()).await;
        if let Some(reply) = reply {
            client.reply(reply);
        }
        let released = match in_time {
            Some(released) => released,
            None => release.await,
        };
        // Whoever takes over needs a place.
        lock(&self.ticket).give_back();
        if let Some(lead) = lead {
            lead.failed();
        }
        client.close(if released == Pursued::Lost { Executed::Lost } else { executed }, Pursued::Held);
    }

    /// What to answer when another attempt has taken the place of this one.
    async fn of_the_winner<R>(&self, response: Told<R>) -> Told<R> {
        let claim = self.lease.claim();
        let winner = match self.lease.ledger().known(self.lease.keys()).await {
            Ok(Known::Done(first, record)) => {
                let is_told = !claim.refuse_other || first == claim.fingerprint;
                if is_told { Record::decode(record).ok() } else { None }
            }
            Ok(Known::Nothing | Known::Running) | Err(_) => None,
        };
        match (winner, self.terms.contract) {
            (Some(record), _) => {
                Box::new(self.terms.replay(record).unwrap_or_else(|refusal| self.terms.refuse(refusal)))
            }
            (None, Contract::Webhook) => Box::new(self.terms.refuse(Rejection::OutcomeUnknown)),
            (None, Contract::Api) => unstored(response),
        }
    }

    /// Tells those who wait what came of the completion.
    fn end(&self, pursued: Pursued, record: &Bytes, as_of: AsOf) {
        self.stop_renewals();
        if pursued == Pursued::Held {
            let (key, fingerprint) = (self.lease.keys().current, self.lease.claim().fingerprint);
            self.lease.ledger().near().put(as_of, key, fingerprint, record, self.retention());
        }
        match self.take_lead() {
            Some(lead) if pursued == Pursued::Held => {
                let fingerprint = self.lease.claim().fingerprint;
                lead.land(Landing::Done { fingerprint, record: record.clone() });
            }
            Some(lead) => lead.step_down(),
            None => {}
        }
    }

    /// Leaves the key to others, of whom one may need the place.
    pub(super) fn give_up(&self) {
        lock(&self.ticket).give_back();
        self.step_down();
    }

    pub(super) fn step_down(&self) {
        if let Some(lead) = self.take_lead() {
            lead.step_down();
        }
    }

    fn take_lead(&self) -> Option<Lead> {
        lock(&self.lead).take()
    }
}

/// Marks a response that a retry will not get again.
pub(super) fn unstored<R>(mut response: Told<R>) -> Told<R> {
    response.headers_mut().remove(IDEMPOTENCY_EXPIRES);
    response.headers_mut().insert(IDEMPOTENCY_STORED, HeaderValue::from_static("false"));
    response
}

/// Marks the response of a run, unless it is a refusal or the outcome of another.
pub(super) fn marked<R>(mut response: Response<ResponseBody<R>>) -> Response<ResponseBody<R>> {
    if response.extensions().get::<Rejection>().is_none() {
        response.headers_mut().entry(IDEMPOTENT_REPLAYED).or_insert(HeaderValue::from_static("false"));
    }
    response
}

// === impl Client ===

impl<R, E> Client<R, E> {
    /// Answers, once. A client that has left misses nothing: its retry gets the outcome.
    pub(super) fn reply(&mut self, reply: Reply<R, E>) {
        if let Some(sender) = self.reply.take() {
            let _ = sender.send(reply);
        }
    }

    pub(super) fn refuse(mut self, terms: &Terms, refusal: Rejection) {
        self.reply(Reply::Response(Box::new(terms.refuse(refusal))));
        self.report.close(Outcome::Refused(refusal));
    }

    /// Passes on the error of a service that could not be called.
    pub(super) fn fail(mut self, error: E) {
        self.reply(Reply::Error(error));
        self.report.close(Outcome::Refused(Rejection::InnerNotReady));
    }

    pub(super) fn close(self, executed: Executed, pursued: Pursued) {
        self.report.close(Outcome::Executed(match pursued {
            Pursued::Held => executed,
            Pursued::Lost => Executed::Lost,
            Pursued::Unanswered => Executed::Unstored,
        }));
    }
}
