//! The layer: the two contracts, and the setters for what is protected by which key.

mod bounds;
mod outcomes;

use std::sync::Arc;

use bytes::Bytes;
use http::{Method, request};
use tower::{BoxError, Layer};

use crate::caller::Caller;
use crate::digest::Secret;
use crate::fingerprint::Payload;
use crate::grpc::InvalidDescriptors;
use crate::key::{HeaderSyntax, Key, KeySource, Keys};
use crate::ledger::Ledger;
use crate::policy::{OnBadKey, OnOtherPayload, OnStoreError, Policy};
use crate::service::Idempotency;
use crate::terms::Terms;

/// Makes a service run each event or request once. See the [crate docs](crate) for an example.
///
/// There are two contracts and no third default: one for senders of [webhooks](Self::webhook), who look only at whether
/// the answer was 2xx, and one for clients of an [api](Self::api), who read it. Each setter names both defaults where they
/// differ. A layer is cheap to clone; setters change only the clone they are called on.
#[derive(Clone, Debug)]
pub struct IdempotencyLayer {
    ledger: Ledger,
    policy: Arc<Policy>,
    /// What goes for these paths instead.
    paths: Arc<Vec<(String, Self)>>,
}

impl IdempotencyLayer {
    /// The contract for webhooks. A duplicate of a finished delivery is answered 200 with the kept body; one of a running
    /// delivery waits briefly and is then told 503, which every sender retries.
    #[must_use]
    pub fn webhook(ledger: &Ledger, key: impl Into<KeySource>) -> Self {
        Self { ledger: ledger.clone(), policy: Arc::new(Policy::webhook(key.into())), paths: Arc::default() }
    }

    /// The contract for clients of an API (draft-ietf-httpapi-idempotency-key-header-07, Stripe). The key is
    /// `Idempotency-Key` or `X-Idempotency-Key`. A duplicate is answered the kept status, headers and body; one of a running
    /// request waits briefly and is then told 409; another payload under the same key is told 422.
    #[must_use]
    pub fn api(ledger: &Ledger, caller: Caller) -> Self {
        Self { ledger: ledger.clone(), policy: Arc::new(Policy::api(caller)), paths: Arc::default() }
    }

    /// Whether the layer does anything at all; while it does not, every request passes through and the store is not asked.
    /// For a switch in the configuration. It switches off what stands [for a path](Self::for_path), too. Default: it does.
    #[must_use]
    pub fn enabled(self, enabled: bool) -> Self {
        self.set(|policy| policy.enabled = enabled)
    }

    /// Has another layer decide about the requests of a path, all that it decides, the [unary](Self::unary) methods too; for a
    /// layer around a whole server, where there is no place for one per route. A path that ends in `/` stands for all
    /// below it, such as the methods of a gRPC service. The longest that fits counts, and of equals the last. What `layer` says of
    /// paths itself does not count. Default: this layer decides about all.
    ///
    /// ```
    /// # use tower_idempotency::{IdempotencyLayer, Ledger, MemoryStore, caller, key};
    /// # let ledger = Ledger::new(MemoryStore::new());
    /// let api = IdempotencyLayer::api(&ledger, caller::authorization());
    /// let charge = api.clone().unary("/pay.v1.Payments/Charge").key(key::protobuf([1])).require_key();
    /// let hooks = IdempotencyLayer::webhook(&ledger, key::json("$.id"));
    /// let all = api.for_path("/pay.v1.Payments/Charge", charge).for_path("/hooks/", hooks);
    /// # let _ = all;
    /// ```
    ///
    /// # Panics
    ///
    /// If `path` does not begin with `/`.
    #[must_use]
    pub fn for_path(mut self, path: &str, layer: Self) -> Self {
        assert!(path.starts_with('/'), "a path begins with a slash");
        Arc::make_mut(&mut self.paths).push((path.to_owned(), layer));
        self
    }

    fn set(mut self, set: impl FnOnce(&mut Policy)) -> Self {
        let policy = Arc::make_mut(&mut self.policy);
        set(policy);
        // It is another layer than the one it was cloned from, and warns for itself.
        policy.warned = Arc::default();
        self
    }

    /// Where the key comes from. Default: the argument of [`webhook`](Self::webhook); the headers of [`api`](Self::api).
    #[must_use]
    pub fn key(self, key: impl Into<KeySource>) -> Self {
        self.set(|policy| policy.key = key.into())
    }

    /// What may stand in a key header. Default: webhook, opaque with 1 to 1024 bytes; api, 1 to 255 visible ASCII
    /// characters, quoted or bare. [`HeaderSyntax::StructuredString`] is the draft to the letter: quoted alone.
    #[must_use]
    pub fn header_syntax(self, syntax: HeaderSyntax) -> Self {
        self.set(|policy| policy.header_syntax = syntax)
    }

    /// Adds to what a key is unique within, beside contract, method, path and caller: a tenant, a host, or the prefix that
    /// a router strips before the layer sees the path. Default: nothing.
    #[must_use]
    pub fn scope<F, K>(self, scope: F) -> Self
    where
        F: Fn(&request::Parts) -> Option<K> + Send + Sync + 'static,
        K: Into<Bytes>,
    {
        self.set(|policy| policy.scope = Some(Arc::new(move |head| Ok(scope(head).map(Into::into)))))
    }

    /// As [`scope`](Self::scope), by a function that may fail, as where a tenant has to be looked up: the request is then
    /// refused with 500 and runs nowhere. The error is named in the request's event, so it must name no secret. Default:
    /// nothing.
    #[must_use]
    pub fn try_scope<F, K, E>(self, scope: F) -> Self
    where
        F: Fn(&request::Parts) -> Result<Option<K>, E> + Send + Sync + 'static,
        K: Into<Bytes>,
        E: Into<BoxError>,
    {
        let scope = move |head: &request::Parts| scope(head).map(|scope| scope.map(Into::into)).map_err(Into::into);
        self.set(|policy| policy.scope = Some(Arc::new(scope)))
    }

    /// Makes stored keys keyed digests, for raw keys that could be guessed, such as consecutive numbers: who reads the store
    /// can then not try which were there. Every process needs the same secret. Default: none. A [fingerprint](crate::fingerprint) is no keyed
    /// digest: where the payload holds the key, or can be guessed itself, compare [nothing](crate::fingerprint::ignored) of it.
    ///
    /// Another secret makes every key another, [`Attempt::key`](crate::Attempt::key) too: what the store knows is found no
    /// more, and would run again. So set the old one as [`previous_secret`](Self::previous_secret) for a while.
    ///
    /// # Panics
    ///
    /// If `secret` is shorter than 16 bytes.
    #[must_use]
    pub fn secret(self, secret: impl AsRef<[u8]>) -> Self {
        let secret = in_length(secret.as_ref());
        self.set(|policy| policy.secret = Some(secret))
    }

    /// The secret before this one. Each request is then claimed under both keys, the previous one first, and its outcome is
    /// kept under both: processes that know either secret, or both, run it once between them. That doubles the calls of the
    /// store. Default: none.
    ///
    /// What is outside of the store knows one key each: a handler that looks for its row, and a call downstream, has to ask for
    /// [`Attempt::previous_key`](crate::Attempt::previous_key) as well.
    ///
    /// To rotate: give every process the new secret with the old one as previous, wait for the longest retention, then
    /// take the old one away.
    ///
    /// # Panics
    ///
    /// If `secret` is shorter than 16 bytes.
    #[must_use]
    pub fn previous_secret(self, secret: impl AsRef<[u8]>) -> Self {
        let secret = in_length(secret.as_ref());
        self.set(|policy| policy.previous_secret = Some(Some(secret)))
    }

    /// As [`previous_secret`](Self::previous_secret), for a service that had none.
    #[must_use]
    pub fn previously_without_secret(self) -> Self {
        self.set(|policy| policy.previous_secret = Some(None))
    }

    /// Which methods are protected. Default: webhook, all, GET too; api, POST and PATCH, so that PUT and DELETE pass
    /// through. HEAD, OPTIONS, CONNECT and upgrades always do; calls of gRPC go by
    /// [`unary`](Self::unary) instead.
    #[must_use]
    pub fn methods(self, methods: impl IntoIterator<Item = Method>) -> Self {
        let methods: Vec<Method> = methods.into_iter().collect();
        self.set(|policy| policy.applies = Arc::new(move |method| methods.contains(method)))
    }

    /// Protects a unary method of [gRPC](crate::grpc), by its path `/package.Service/Method`. Default: none, and every call
    /// passes through.
    ///
    /// A method that streams must not be named: its requests would be waited for to their end.
    ///
    /// # Panics
    ///
    /// If `path` is no such path.
    #[must_use]
    pub fn unary(self, path: &str) -> Self {
        self.set(|policy| {
            let is_path = policy.unary.insert(path);
            assert!(is_path, "not the path of a method: {path:?}");
        })
    }

    /// Protects every unary method that an encoded `google.protobuf.FileDescriptorSet` knows, as `protoc
    /// --descriptor_set_out` writes it and `tonic_reflection` takes it, unless it declares `idempotency_level =
    /// NO_SIDE_EFFECTS`. Default: none.
    ///
    /// # Errors
    ///
    /// If `descriptors` is no such set.
    pub fn unary_methods_of(self, descriptors: &[u8]) -> Result<Self, InvalidDescriptors> {
        let mut methods = self.policy.unary.clone();
        methods.insert_all(descriptors)?;
        Ok(self.set(|policy| policy.unary = methods))
    }

    /// Refuses a request without a key with 400: [`missing_key`](Self::missing_key) with [`OnBadKey::Refuse`].
    #[must_use]
    pub fn require_key(self) -> Self {
        self.missing_key(OnBadKey::Refuse)
    }

    /// What happens to a request without a key. Default: [`OnBadKey::PassThrough`]; the first of each layer is warned of.
    #[must_use]
    pub fn missing_key(self, then: OnBadKey) -> Self {
        self.set(|policy| policy.missing_key = then)
    }

    /// What happens to a malformed key: two different values, a list, a JSON value that is no scalar or stands twice, a body
    /// that is not the JSON, the multipart form or the protobuf message it has to be, a part that is not
    /// [valid](KeySource::valid_if). Default:
    /// webhook, [`OnBadKey::PassThrough`], where the first of each layer is warned of; api, [`OnBadKey::Refuse`].
    #[must_use]
    pub fn malformed_key(self, then: OnBadKey) -> Self {
        self.set(|policy| policy.malformed_key = then)
    }

    /// What of a request is compared with the one that brought its key first. Default: webhook, [`ignored`]; api, [`whole`].
    ///
    /// What was kept under another setting does not match.
    ///
    /// [`ignored`]: crate::fingerprint::ignored
    /// [`whole`]: crate::fingerprint::whole
    #[must_use]
    pub fn fingerprint(self, payload: Payload) -> Self {
        self.set(|policy| policy.fingerprint = payload)
    }

    /// What happens to another payload under a known key. Default: webhook, [`OnOtherPayload::Replay`]; api,
    /// [`OnOtherPayload::Refuse`].
    #[must_use]
    pub fn other_payload(self, then: OnOtherPayload) -> Self {
        self.set(|policy| policy.other_payload = then)
    }

    /// What happens when the store does not answer. Default: [`OnStoreError::Refuse`], with 503.
    #[must_use]
    pub fn on_store_error(self, then: OnStoreError) -> Self {
        self.set(|policy| policy.on_store_error = then)
    }
}

impl IdempotencyLayer {
    /// The key under which the ledger knows a request, for [`Ledger::lookup`] and [`Ledger::forget`]; none where it would
    /// pass through or be refused for its key.
    #[must_use]
    pub fn key_of(&self, head: &request::Parts, body: &Bytes) -> Option<Key> {
        Some(self.keys_of(head, body)?.current)
    }

    /// The same request's key under the [`previous_secret`](Self::previous_secret), while secrets rotate. An event that is
    /// to run again then has to be forgotten under both.
    #[must_use]
    pub fn previous_key_of(&self, head: &request::Parts, body: &Bytes) -> Option<Key> {
        self.keys_of(head, body)?.previous
    }

    fn keys_of(&self, head: &request::Parts, body: &Bytes) -> Option<Keys> {
        let policy = &self.of_path(head.uri.path()).policy;
        let parts = policy.extract(head, body).ok().flatten();
        parts.filter(|_| policy.applies(head)).and_then(|parts| policy.stored_keys(head, &parts).ok())
    }

    /// What goes for a request, and where its key is known.
    pub(crate) fn terms(&self, head: &request::Parts) -> (Ledger, Terms) {
        let layer = self.of_path(head.uri.path());
        (layer.ledger.clone(), Terms::of(Arc::clone(&layer.policy), head))
    }

    fn of_path(&self, path: &str) -> &Self {
        if !self.policy.enabled {
            return self;
        }
        let fits = |there: &str| path == there || there.ends_with('/') && path.starts_with(there);
        let fitting = self.paths.iter().filter(|(there, _)| fits(there));
        fitting.max_by_key(|(there, _)| there.len()).map_or(self, |(_, layer)| layer)
    }
}

impl<S> Layer<S> for IdempotencyLayer {
    type Service = Idempotency<S>;

    fn layer(&self, inner: S) -> Idempotency<S> {
        Idempotency::new(inner, self.clone())
    }
}

fn in_length(secret: &[u8]) -> Secret {
    assert!(secret.len() >= 16, "a secret has at least 16 bytes");
    Secret::new(secret)
}
