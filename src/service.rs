//! The way of one request.
//!
//! ```text
//! request ─► applies? ─► body, key ─► claim ─┬─ acquired ─► run inner, renew lease ─► keep / release ─► respond
//!               │            │               ├─ done     ─► replay
//!               no           none            ├─ running  ─► attach ─► (done | free again ─► claim | patience over ─► refuse)
//!               ▼            ▼               ├─ mismatch ─► refuse | replay
//!           pass through  contract           └─ store down ─► refuse 503 | bypass
//! ```

use std::fmt;
use std::future::poll_fn;
use std::ops::ControlFlow;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, request};
use http_body::Body;
use tokio::time::{Instant, sleep};
use tower::{BoxError, Service};

use crate::attempt::{Asked, Attempt, Lease, Run};
use crate::body::{Failed, RequestBody, ResponseBody};
use crate::fingerprint::Fingerprint;
use crate::flight::{Landing, Lead, Seat, Turn};
use crate::intake::{Intake, Keyed, take_in};
use crate::key::Keys;
use crate::layer::IdempotencyLayer;
use crate::ledger::{Known, Ledger};
use crate::near::AtHand;
use crate::policy::OnStoreError;
use crate::record::Record;
use crate::rejection::Rejection;
use crate::store::{MAX_DURATION, StoreError};
use crate::telemetry::{self, Outcome, PassedThrough, Report, Timer};
use crate::terms::Terms;
use crate::within::within;

/// A service behind an [`IdempotencyLayer`]. See the [crate docs](crate) for an example.
///
/// It is always ready. An attempt readies a clone of the inner service when it has its claim, so only requests that run
/// hold what the inner service is short of, and duplicates that wait hold nothing.
#[derive(Clone, Debug)]
pub struct Idempotency<S> {
    inner: S,
    layer: IdempotencyLayer,
}

/// One request on its way, with the terms that go for it.
struct Delivery<S> {
    inner: S,
    ledger: Ledger,
    terms: Terms,
}

/// What may run under a claim, once.
struct Event<B> {
    head: request::Parts,
    body: RequestBody<B>,
    failed: Failed,
    keys: Keys,
    fingerprint: Option<Fingerprint>,
    /// Until when it waits for others of its key.
    patience: Instant,
}

/// The response of an [`Idempotency`] service.
pub struct ResponseFuture<R, E>(Pin<Box<dyn Future<Output = Answer<R, E>> + Send>>);

type Answer<R, E> = Result<Response<ResponseBody<R>>, E>;

impl<S> Idempotency<S> {
    pub(crate) const fn new(inner: S, layer: IdempotencyLayer) -> Self {
        Self { inner, layer }
    }

    /// The inner service.
    pub const fn get_ref(&self) -> &S {
        &self.inner
    }

    /// The inner service.
    pub const fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// The inner service.
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl<S, B, R> Service<Request<B>> for Idempotency<S>
where
    S: Service<Request<RequestBody<B>>, Response = Response<R>> + Clone + Send + 'static,
    S::Error: Send + 'static,
    S::Future: Send + 'static,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Send,
    R: Body<Data = Bytes> + Send + 'static,
    R::Error: Into<BoxError>,
{
    type Response = Response<ResponseBody<R>>;
    type Error = S::Error;
    type Future = ResponseFuture<R, S::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let (head, body) = request.into_parts();
        let (ledger, terms) = self.layer.terms(&head);
        let delivery = Delivery { inner: self.inner.clone(), ledger, terms };
        ResponseFuture(Box::pin(delivery.run(head, body)))
    }
}

impl<S> Delivery<S> {
    /// From the request to its key, and on to what is known of that in this process.
    fn run<B, R>(self, head: request::Parts, body: B) -> impl Future<Output = Answer<R, S::Error>>
    where
        S: Service<Request<RequestBody<B>>, Response = Response<R>> + Send + 'static,
        S::Error: Send + 'static,
        S::Future: Send + 'static,
        B: Body<Data = Bytes> + Send + 'static,
        R: Body<Data = Bytes> + Send + 'static,
        R::Error: Into<BoxError>,
    {
        async move {
            let received = Instant::now();
            let mut report = Report::open(self.terms.contract);
            if !self.terms.applies(&head) {
                if self.terms.overlooks(&head) {
                    self.terms.warn_once(PassedThrough::NotApplicable);
                }
                let outcome = Outcome::PassedThrough(PassedThrough::NotApplicable);
                return Box::pin(self.run_unprotected(head, RequestBody::untouched(body), outcome, report)).await;
            }
            let Keyed { parts, fingerprint, body, failed } = match take_in(&self.terms, &head, body, &mut report).await
            {
                Intake::Keyed(keyed) => keyed,
                Intake::PassThrough(body, why) => {
                    return Box::pin(self.run_unprotected(head, body, Outcome::PassedThrough(why), report)).await;
                }
                Intake::Refuse(refusal) => return Ok(self.refuse(refusal, report)),
            };
            let keys = match self.terms.stored_keys(&head, &parts) {
                Ok(keys) => keys,
                Err(error) => {
                    report.cause(&*error);
                    return Ok(self.refuse(Rejection::ScopeUnknown, report));
                }
            };
            // Who waits holds no more than it needs to run.
            drop(parts);
            let key = keys.current;
            if head.extensions.get::<Attempt>().is_some_and(|outer| outer.is_under(&self.ledger, keys)) {
                // The same rule once more, inside of itself: waiting for the attempt it is part of would never end.
                let outcome = Outcome::PassedThrough(PassedThrough::NotApplicable);
                return Box::pin(self.run_unprotected(head, body, outcome, report)).await;
            }
            report.key(key);
            if let Some(AtHand { fingerprint: first, record }) = self.ledger.near().get(&key) {
                return Ok(match fingerprint != first {
                    true if self.terms.refuses_other() => self.refuse(Rejection::KeyReused, report),
                    other_payload => self.replay(record, other_payload, report),
                });
            }
            let patience = self.terms.patient_until(&head, received);
            let event = Event { head, body, failed, keys, fingerprint, patience };
            // In a box of its own: both steps together would take more than an allocator has at hand.
            Box::pin(self.claim(event, report)).await
        }
    }

    /// From the claim to the answer.
    fn claim<B, R>(self, event: Event<B>, mut report: Report) -> impl Future<Output = Answer<R, S::Error>>
    where
        S: Service<Request<RequestBody<B>>, Response = Response<R>> + Send + 'static,
        S::Error: Send + 'static,
        S::Future: Send + 'static,
        B: Send + 'static,
        R: Body<Data = Bytes> + Send + 'static,
        R::Error: Into<BoxError>,
    {
        async move {
            // Panics in a runtime without timers: there no lease could be renewed, so nothing is claimed.
            drop(sleep(Duration::ZERO));
            let mut seat = Seat::take(&self.ledger, event.keys.current, event.fingerprint, self.terms.refuses_other());
            let claimed = loop {
                let mut lead = match seat.turn(event.patience, &mut report).await {
                    Turn::Lead(lead) => lead,
                    Turn::Landed(Landing::Done { fingerprint: first, record }) => {
                        return Ok(self.replay(record, seat.differs_from(first), report));
                    }
                    Turn::Landed(Landing::Failed) => return Ok(self.refuse(Rejection::AttemptFailed, report)),
                    Turn::Landed(Landing::StoreUnavailable) => break Err(self.terms.on_store_error),
                    Turn::Landed(Landing::Unreadable) => break Err(OnStoreError::Refuse),
                    Turn::Mismatch => return Ok(self.refuse(Rejection::KeyReused, report)),
                    Turn::OutOfPatience(lease_until) => {
                        report.close(Outcome::Refused(Rejection::Running));
                        return Ok(self.terms.refuse_until(Rejection::Running, self.terms.free_at(lease_until)));
                    }
                    Turn::Full => return Ok(self.refuse(Rejection::Overloaded, report)),
                };
                let Some(ticket) = self.ledger.attempt() else {
                    let known = match Box::pin(self.ledger.known(event.keys)).await {
                        Ok(known) => known,
                        Err(error) => break Err(self.store_failed(&error, lead, &mut report)),
                    };
                    match self.without_place(known, lead, &seat, report) {
                        ControlFlow::Continue(goes_on) => report = goes_on,
                        ControlFlow::Break(answer) => return Ok(answer),
                    }
                    continue;
                };
                let as_of = self.ledger.near().as_of();
                let timer = Timer::start();
                let asked = Box::pin(Lease::ask(&self.ledger, event.keys, self.terms.claim(event.fingerprint))).await;
                telemetry::asked(self.terms.contract, timer, &asked);
                match asked {
                    Ok(Asked::Acquired(lease)) => {
                        lead.running_here();
                        break Ok((lease, lead, ticket));
                    }
                    Ok(Asked::Done { fingerprint: first, record }) => {
                        // While secrets rotate it may be known under the other key alone, and be forgotten under that.
                        if event.keys.previous.is_none() {
                            self.ledger.near().put(as_of, event.keys.current, first, &record, MAX_DURATION);
                        }
                        lead.land(Landing::Done { fingerprint: first, record: record.clone() });
                        return Ok(self.replay(record, seat.differs_from(first), report));
                    }
                    Ok(Asked::Running { fingerprint: first, lease_left }) => lead.running_elsewhere(first, lease_left),
                    Ok(Asked::Mismatch) => return Ok(self.refuse(Rejection::KeyReused, report)),
                    Err(error) => break Err(self.store_failed(&error, lead, &mut report)),
                }
            };
            // From here on it waits for nobody, however long it runs.
            drop(seat);
            let (lease, lead, ticket) = match claimed {
                Ok(claimed) => claimed,
                Err(on_store_error) => {
                    return Box::pin(self.without_store(on_store_error, event.head, event.body, report)).await;
                }
            };
            let run = Run::new(self.terms.clone(), lease, lead, event.failed, ticket);
            run.start(&self.terms, self.inner, Request::from_parts(event.head, event.body), report).await
        }
    }

    /// Passes a request on as if the layer were not there, except that no wait is without an end, unless it is not to be there.
    async fn run_unprotected<B, R>(
        mut self,
        head: request::Parts,
        body: RequestBody<B>,
        outcome: Outcome,
        report: Report,
    ) -> Answer<R, S::Error>
    where
        S: Service<Request<RequestBody<B>>, Response = Response<R>>,
    {
        let patience = if self.terms.enabled { self.terms.ready_timeout } else { MAX_DURATION };
        match within(patience, poll_fn(|cx| self.inner.poll_ready(cx))).await {
            Some(Ok(())) => {}
            Some(Err(error)) => {
                report.close(Outcome::Refused(Rejection::InnerNotReady));
                return Err(error);
            }
            None => return Ok(self.refuse(Rejection::InnerNotReady, report)),
        }
        report.close(outcome);
        let response = self.inner.call(Request::from_parts(head, body)).await?;
        Ok(response.map(ResponseBody::inner))
    }

    /// Tells those who wait that the store failed, and what is to be done: what was seen is not run by a bypass either.
    fn store_failed(&self, error: &StoreError, lead: Lead, report: &mut Report) -> OnStoreError {
        report.cause(error);
        let (landing, on_store_error) = match error.is_unreadable() {
            true => (Landing::Unreadable, OnStoreError::Refuse),
            false => (Landing::StoreUnavailable, self.terms.on_store_error),
        };
        lead.land(landing);
        on_store_error
    }

    /// Nobody knows what has become of the event.
    async fn without_store<B, R>(
        self,
        on_store_error: OnStoreError,
        head: request::Parts,
        body: RequestBody<B>,
        report: Report,
    ) -> Answer<R, S::Error>
    where
        S: Service<Request<RequestBody<B>>, Response = Response<R>>,
    {
        match on_store_error {
            // What is being drained starts nothing.
            OnStoreError::Bypass if !self.ledger.is_draining() => {
                self.run_unprotected(head, body, Outcome::Bypassed, report).await
            }
            OnStoreError::Bypass | OnStoreError::Refuse => Ok(self.refuse(Rejection::StoreUnavailable, report)),
        }
    }

    /// No attempt may start, but what has finished can still be told, and what runs elsewhere be waited for.
    fn without_place<R>(
        &self,
        known: Known,
        lead: Lead,
        seat: &Seat,
        report: Report,
    ) -> ControlFlow<Response<ResponseBody<R>>, Report> {
        let draining = self.ledger.is_draining();
        ControlFlow::Break(match known {
            Known::Done(first, record) => {
                lead.land(Landing::Done { fingerprint: first, record: record.clone() });
                match seat.refuses(first) {
                    true => self.refuse(Rejection::KeyReused, report),
                    false => self.replay(record, seat.differs_from(first), report),
                }
            }
            Known::Running if !draining => {
                lead.look_later();
                return ControlFlow::Continue(report);
            }
            Known::Nothing | Known::Running => {
                self.refuse(if draining { Rejection::ShuttingDown } else { Rejection::Overloaded }, report)
            }
        })
    }

    fn replay<R>(&self, record: Bytes, other_payload: bool, mut report: Report) -> Response<ResponseBody<R>> {
        let record = match Record::decode(record) {
            Ok(record) => record,
            Err(error) => {
                report.cause(&error);
                return self.refuse(Rejection::StoreUnavailable, report);
            }
        };
        match self.terms.replay(record) {
            Ok(response) => {
                report.close(Outcome::Replayed { other_payload });
                response
            }
            Err(refusal) => self.refuse(refusal, report),
        }
    }

    fn refuse<R>(&self, refusal: Rejection, report: Report) -> Response<ResponseBody<R>> {
        report.close(Outcome::Refused(refusal));
        self.terms.refuse(refusal)
    }
}

// === impl ResponseFuture ===

impl<R, E> Future for ResponseFuture<R, E> {
    type Output = Answer<R, E>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(cx)
    }
}

impl<R, E> fmt::Debug for ResponseFuture<R, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}
