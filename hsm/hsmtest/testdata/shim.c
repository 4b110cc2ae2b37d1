/*
 * A PKCS#11 module that stands before a real one, records what it signs and
 * misbehaves on command.
 *
 * CHANCERY_SHIM_MODULE names the real module, CHANCERY_SHIM_CONTROL a file that
 * the test maps too: 64-bit words, then a ring of records (shim.go has their
 * meaning). Every function of CK_FUNCTION_LIST is wrapped: it is counted, hangs,
 * loses the sessions, fails or finds the device removed as the words say, and
 * else asks the real module.
 *
 * CK_FUNCTION_LIST is a version (two octets) and function pointers in the fixed
 * order of PKCS#11 v2.40, pkcs11f.h, so no header is needed.
 *
 * The words and the ring may be shared by processes (a p11-kit server has the
 * shim as its provider); the table of sessions is each process's own.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

typedef unsigned long ulong_t;
typedef ulong_t rv_t;
typedef unsigned char octet;

enum { FUNCTIONS = 68, TABLE = 4096, RING = 65536, WORDS = 128 };

struct list {
	octet version[2];
	void *f[FUNCTIONS];
};

/* Return values (PKCS#11 v2.40, Section 5.1). */
enum { OK = 0, GENERAL_ERROR = 5, DEVICE_REMOVED = 0x32, PIN_INCORRECT = 0xA0,
	PIN_LOCKED = 0xA4, SESSION_COUNT = 0xB1, TOKEN_NOT_PRESENT = 0xE0 };

/* Token flags (Section 3.2). */
enum { TOKEN_INITIALIZED = 0x400, PIN_COUNT_LOW = 0x10000, PIN_FINAL_TRY = 0x20000,
	PIN_IS_LOCKED = 0x40000 };

enum { W_LOGINS, W_SIGNS, W_DELAY_US, W_HANG, W_CORRUPT_EVERY, W_RUNNING,
	W_PEAK, W_TOKEN_FLAGS, W_FAIL_FUNCTION, W_FAIL_RV, W_FAIL_COUNT,
	W_CORRUPTED, W_FAILED, W_MAX_SESSIONS, W_FAIL_SKIP, W_FAIL_AFTER,
	W_HANGING, W_LOSE, W_REMOVED, W_PIN_TRIES, W_PIN_WRONG, W_SESSION_LIMIT,
	W_SESSIONS, W_SESSIONS_PEAK, W_RECORDS, W_KEY_RV, W_KEY_ID, W_PASS, W_CALLS = 32 /* one for each function */ };

enum { INITIALIZE = 0, FINALIZE = 1, GET_FUNCTION_LIST = 3, GET_SLOT_LIST = 4,
	GET_TOKEN_INFO = 6, OPEN_SESSION = 12, CLOSE_SESSION = 13, CLOSE_ALL = 14,
	LOGIN = 18, LOGOUT = 19, GET_ATTRIBUTE = 24, SIGN_INIT = 42, SIGN = 43,
	SIGN_FINAL = 45, LOST = 100 /* not a function: all sessions were lost */ };

/* What a removed device means for a function. */
enum kind { MODULE, SLOT, SESSION };

enum { CORRUPTED = 1, INJECTED = 2 };

/* One record of the ring. sequence is written last. */
struct record {
	_Atomic ulong_t sequence; /* place in the order of all records, from 1 */
	/* In the words and here functions are counted from 1, so that 0 is none. */
	ulong_t function, rv, slot, flags;
	ulong_t id_len, data_len, signature_len;
	octet id[32], data[64], signature[96];
};

struct session {
	ulong_t handle, slot; /* handle 0: not in use */
	ulong_t id_len;
	octet id[32]; /* CKA_ID of the key of C_SignInit */
};

static struct list *real;
static struct list ours;
static _Atomic ulong_t *words;
static struct record *ring;

/* gate is held for reading in every call of the real module, and for writing
 * while its sessions are taken away: SoftHSM does not survive a session that
 * is closed under a running call. */
static pthread_rwlock_t gate = PTHREAD_RWLOCK_WRITER_NONRECURSIVE_INITIALIZER_NP;
static pthread_mutex_t table_lock = PTHREAD_MUTEX_INITIALIZER;
static struct session table[TABLE]; /* under table_lock */

static void nap(ulong_t us)
{
	struct timespec t = { us / 1000000, (us % 1000000) * 1000 };
	nanosleep(&t, NULL);
}

static ulong_t get(int w) { return atomic_load(&words[w]); }

static void raise_to(int w, ulong_t value)
{
	ulong_t peak = get(w);
	while (value > peak && !atomic_compare_exchange_weak(&words[w], &peak, value))
		;
}

/* take lowers a word that is not 0 and says whether it did. */
static int take(int w)
{
	ulong_t left = get(w);
	while (left > 0)
		if (atomic_compare_exchange_weak(&words[w], &left, left - 1))
			return 1;
	return 0;
}

static ulong_t cut(ulong_t len, ulong_t most) { return len < most ? len : most; }

/* note adds a record. */
static void note(ulong_t function, rv_t rv, ulong_t slot, ulong_t flags, const struct session *s,
	const void *data, ulong_t data_len, const void *signature, ulong_t signature_len)
{
	ulong_t n = atomic_fetch_add(&words[W_RECORDS], 1);
	struct record *r = &ring[n % RING];
	r->function = function + 1;
	r->rv = rv;
	r->slot = slot;
	r->flags = flags;
	r->id_len = s ? s->id_len : 0;
	if (s)
		memcpy(r->id, s->id, sizeof r->id);
	r->data_len = data ? cut(data_len, sizeof r->data) : 0;
	memcpy(r->data, data ? data : "", r->data_len);
	r->signature_len = signature ? cut(signature_len, sizeof r->signature) : 0;
	memcpy(r->signature, signature ? signature : "", r->signature_len);
	atomic_store_explicit(&r->sequence, n + 1, memory_order_release);
}

/* known copies a session of the table; its slot is ~0 if it is not there. */
static struct session known(ulong_t handle)
{
	struct session found = { handle, ~0ul, 0, { 0 } };
	pthread_mutex_lock(&table_lock);
	for (int i = 0; i < TABLE; i++)
		if (handle && table[i].handle == handle) {
			found = table[i];
			break;
		}
	pthread_mutex_unlock(&table_lock);
	return found;
}

static void add(ulong_t handle, ulong_t slot)
{
	pthread_mutex_lock(&table_lock);
	for (int i = 0; i < TABLE; i++)
		if (table[i].handle == 0) {
			table[i] = (struct session){ handle, slot, 0, { 0 } };
			raise_to(W_SESSIONS_PEAK, atomic_fetch_add(&words[W_SESSIONS], 1) + 1);
			break;
		}
	pthread_mutex_unlock(&table_lock);
}

/* drop forgets sessions: those with this handle or, with handle 0, of this
 * slot; with slot ~0, of every slot. */
static void drop(ulong_t handle, ulong_t slot)
{
	pthread_mutex_lock(&table_lock);
	for (int i = 0; i < TABLE; i++)
		if (table[i].handle && (handle ? table[i].handle == handle : slot == ~0ul || table[i].slot == slot)) {
			table[i].handle = 0;
			atomic_fetch_sub(&words[W_SESSIONS], 1);
		}
	pthread_mutex_unlock(&table_lock);
}

/* lose takes every session away, and with them the logins. */
static void lose(void)
{
	pthread_rwlock_wrlock(&gate);
	for (int i = 0; i < TABLE; i++) {
		pthread_mutex_lock(&table_lock);
		ulong_t slot = table[i].slot, handle = table[i].handle;
		pthread_mutex_unlock(&table_lock);
		if (handle == 0)
			continue;
		((rv_t (*)(ulong_t))real->f[CLOSE_ALL])(slot);
		drop(0, slot);
	}
	note(LOST, OK, ~0ul, INJECTED, NULL, NULL, 0, NULL, 0);
	pthread_rwlock_unlock(&gate);
}

/* fails says whether function shall fail now, and with what. */
static rv_t fails(ulong_t function, ulong_t after)
{
	if (get(W_FAIL_FUNCTION) != function + 1 || get(W_FAIL_AFTER) != after || get(W_FAIL_COUNT) == 0)
		return OK;
	if (take(W_FAIL_SKIP) || !take(W_FAIL_COUNT))
		return OK;
	atomic_fetch_add(&words[W_FAILED], 1);
	return get(W_FAIL_RV);
}

/* hang does not return while function is named, unless it is let pass. */
static void hang(ulong_t function)
{
	if (get(W_HANG) != function + 1)
		return;
	atomic_fetch_add(&words[W_HANGING], 1);
	while (get(W_HANG) == function + 1 && !take(W_PASS))
		nap(1000);
	atomic_fetch_sub(&words[W_HANGING], 1);
}

/* enter is the way into a function: not OK is what it shall return. */
static rv_t enter(ulong_t function, enum kind kind)
{
	atomic_fetch_add(&words[W_CALLS + function], 1);
	if (function != SIGN) /* hangs later, when it counts as running */
		hang(function);
	if (take(W_LOSE))
		lose();
	rv_t rv = fails(function, 0);
	if (rv == OK && get(W_REMOVED) && kind != MODULE)
		rv = kind == SLOT ? TOKEN_NOT_PRESENT : DEVICE_REMOVED;
	return rv;
}

/* leave is the way out: a success may still be denied. */
static rv_t leave(ulong_t function, rv_t rv)
{
	rv_t denied = rv == OK ? fails(function, 1) : OK;
	return denied ? denied : rv;
}

#define ASK(n, params, args) ({ \
	pthread_rwlock_rdlock(&gate); \
	rv_t answer = ((rv_t (*) params)real->f[n]) args; \
	pthread_rwlock_unlock(&gate); \
	answer; })

#define PLAIN(n, name, kind, params, args) \
static rv_t name params \
{ \
	rv_t rv = enter(n, kind); \
	return rv ? rv : leave(n, ASK(n, params, args)); \
}

typedef ulong_t u; /* handles, numbers */
typedef void *p;

#define EACH_PLAIN(X) \
	X(2, get_info, MODULE, (p a), (a)) \
	X(5, get_slot_info, MODULE, (u a, p b), (a, b)) \
	X(7, get_mechanism_list, SLOT, (u a, p b, p c), (a, b, c)) \
	X(8, get_mechanism_info, SLOT, (u a, u b, p c), (a, b, c)) \
	X(9, init_token, SLOT, (u a, p b, u c, p d), (a, b, c, d)) \
	X(10, init_pin, SESSION, (u a, p b, u c), (a, b, c)) \
	X(11, set_pin, SESSION, (u a, p b, u c, p d, u e), (a, b, c, d, e)) \
	X(15, get_session_info, SESSION, (u a, p b), (a, b)) \
	X(16, get_operation_state, SESSION, (u a, p b, p c), (a, b, c)) \
	X(17, set_operation_state, SESSION, (u a, p b, u c, u d, u e), (a, b, c, d, e)) \
	X(20, create_object, SESSION, (u a, p b, u c, p d), (a, b, c, d)) \
	X(21, copy_object, SESSION, (u a, u b, p c, u d, p e), (a, b, c, d, e)) \
	X(22, destroy_object, SESSION, (u a, u b), (a, b)) \
	X(23, get_object_size, SESSION, (u a, u b, p c), (a, b, c)) \
	X(24, get_attribute_value, SESSION, (u a, u b, p c, u d), (a, b, c, d)) \
	X(25, set_attribute_value, SESSION, (u a, u b, p c, u d), (a, b, c, d)) \
	X(26, find_objects_init, SESSION, (u a, p b, u c), (a, b, c)) \
	X(27, find_objects, SESSION, (u a, p b, u c, p d), (a, b, c, d)) \
	X(28, find_objects_final, SESSION, (u a), (a)) \
	X(29, encrypt_init, SESSION, (u a, p b, u c), (a, b, c)) \
	X(30, encrypt, SESSION, (u a, p b, u c, p d, p e), (a, b, c, d, e)) \
	X(31, encrypt_update, SESSION, (u a, p b, u c, p d, p e), (a, b, c, d, e)) \
	X(32, encrypt_final, SESSION, (u a, p b, p c), (a, b, c)) \
	X(33, decrypt_init, SESSION, (u a, p b, u c), (a, b, c)) \
	X(34, decrypt, SESSION, (u a, p b, u c, p d, p e), (a, b, c, d, e)) \
	X(35, decrypt_update, SESSION, (u a, p b, u c, p d, p e), (a, b, c, d, e)) \
	X(36, decrypt_final, SESSION, (u a, p b, p c), (a, b, c)) \
	X(37, digest_init, SESSION, (u a, p b), (a, b)) \
	X(38, digest, SESSION, (u a, p b, u c, p d, p e), (a, b, c, d, e)) \
	X(39, digest_update, SESSION, (u a, p b, u c), (a, b, c)) \
	X(40, digest_key, SESSION, (u a, u b), (a, b)) \
	X(41, digest_final, SESSION, (u a, p b, p c), (a, b, c)) \
	X(44, sign_update, SESSION, (u a, p b, u c), (a, b, c)) \
	X(46, sign_recover_init, SESSION, (u a, p b, u c), (a, b, c)) \
	X(47, sign_recover, SESSION, (u a, p b, u c, p d, p e), (a, b, c, d, e)) \
	X(48, verify_init, SESSION, (u a, p b, u c), (a, b, c)) \
	X(49, verify, SESSION, (u a, p b, u c, p d, u e), (a, b, c, d, e)) \
	X(50, verify_update, SESSION, (u a, p b, u c), (a, b, c)) \
	X(51, verify_final, SESSION, (u a, p b, u c), (a, b, c)) \
	X(52, verify_recover_init, SESSION, (u a, p b, u c), (a, b, c)) \
	X(53, verify_recover, SESSION, (u a, p b, u c, p d, p e), (a, b, c, d, e)) \
	X(54, digest_encrypt_update, SESSION, (u a, p b, u c, p d, p e), (a, b, c, d, e)) \
	X(55, decrypt_digest_update, SESSION, (u a, p b, u c, p d, p e), (a, b, c, d, e)) \
	X(56, sign_encrypt_update, SESSION, (u a, p b, u c, p d, p e), (a, b, c, d, e)) \
	X(57, decrypt_verify_update, SESSION, (u a, p b, u c, p d, p e), (a, b, c, d, e)) \
	X(58, generate_key, SESSION, (u a, p b, p c, u d, p e), (a, b, c, d, e)) \
	X(59, generate_key_pair, SESSION, (u a, p b, p c, u d, p e, u f, p g, p h), (a, b, c, d, e, f, g, h)) \
	X(60, wrap_key, SESSION, (u a, p b, u c, u d, p e, p f), (a, b, c, d, e, f)) \
	X(61, unwrap_key, SESSION, (u a, p b, u c, p d, u e, p f, u g, p h), (a, b, c, d, e, f, g, h)) \
	X(62, derive_key, SESSION, (u a, p b, u c, p d, u e, p f), (a, b, c, d, e, f)) \
	X(63, seed_random, SESSION, (u a, p b, u c), (a, b, c)) \
	X(64, generate_random, SESSION, (u a, p b, u c), (a, b, c)) \
	X(65, get_function_status, SESSION, (u a), (a)) \
	X(66, cancel_function, SESSION, (u a), (a)) \
	X(67, wait_for_slot_event, MODULE, (u a, p b, p c), (a, b, c))

EACH_PLAIN(PLAIN)

static rv_t initialize(p arguments)
{
	rv_t rv = enter(INITIALIZE, MODULE);
	if (rv == OK)
		rv = leave(INITIALIZE, ASK(INITIALIZE, (p), (arguments)));
	note(INITIALIZE, rv, ~0ul, 0, NULL, NULL, 0, NULL, 0);
	return rv;
}

static rv_t finalize(p reserved)
{
	rv_t rv = enter(FINALIZE, MODULE);
	if (rv == OK) {
		rv = ASK(FINALIZE, (p), (reserved));
		if (rv == OK)
			drop(0, ~0ul);
		rv = leave(FINALIZE, rv);
	}
	note(FINALIZE, rv, ~0ul, 0, NULL, NULL, 0, NULL, 0);
	return rv;
}

static rv_t get_slot_list(octet present, p slots, ulong_t *count)
{
	rv_t rv = enter(GET_SLOT_LIST, MODULE);
	if (rv != OK)
		return rv;
	if (present && get(W_REMOVED)) {
		*count = 0;
		return OK;
	}
	return leave(GET_SLOT_LIST, ASK(GET_SLOT_LIST, (octet, p, ulong_t *), (present, slots, count)));
}

/* pin_flags are what a token shows that counts wrong PINs. */
static ulong_t pin_flags(void)
{
	ulong_t tries = get(W_PIN_TRIES), wrong = get(W_PIN_WRONG);
	if (tries == 0 || wrong == 0)
		return 0;
	if (wrong >= tries)
		return PIN_COUNT_LOW | PIN_IS_LOCKED;
	return wrong + 1 == tries ? PIN_COUNT_LOW | PIN_FINAL_TRY : PIN_COUNT_LOW;
}

static rv_t get_token_info(ulong_t slot, octet *info)
{
	rv_t rv = enter(GET_TOKEN_INFO, SLOT);
	if (rv == OK)
		rv = leave(GET_TOKEN_INFO, ASK(GET_TOKEN_INFO, (ulong_t, octet *), (slot, info)));
	if (rv == OK) {
		/* label 32, manufacturer 32, model 16, serial 16, then flags */
		ulong_t flags;
		memcpy(&flags, info + 96, sizeof flags);
		if (flags & TOKEN_INITIALIZED)
			flags |= get(W_TOKEN_FLAGS) | pin_flags();
		memcpy(info + 96, &flags, sizeof flags);
		ulong_t most = get(W_MAX_SESSIONS);
		if (most) /* ulMaxRwSessionCount, after two counts */
			memcpy(info + 120, &most, sizeof most);
	}
	return rv;
}

static rv_t open_session(ulong_t slot, ulong_t flags, p app, p notify, ulong_t *session)
{
	rv_t rv = enter(OPEN_SESSION, SLOT);
	if (rv != OK)
		return rv;
	ulong_t limit = get(W_SESSION_LIMIT);
	if (limit && get(W_SESSIONS) >= limit)
		return SESSION_COUNT;
	rv = ASK(OPEN_SESSION, (ulong_t, ulong_t, p, p, ulong_t *), (slot, flags, app, notify, session));
	if (rv == OK)
		add(*session, slot);
	return leave(OPEN_SESSION, rv);
}

static rv_t close_session(ulong_t session)
{
	rv_t rv = enter(CLOSE_SESSION, SESSION);
	if (rv != OK)
		return rv;
	rv = ASK(CLOSE_SESSION, (ulong_t), (session));
	if (rv == OK)
		drop(session, 0);
	return leave(CLOSE_SESSION, rv);
}

static rv_t close_all_sessions(ulong_t slot)
{
	rv_t rv = enter(CLOSE_ALL, SLOT);
	if (rv == OK) {
		rv = ASK(CLOSE_ALL, (ulong_t), (slot));
		if (rv == OK)
			drop(0, slot);
		rv = leave(CLOSE_ALL, rv);
	}
	note(CLOSE_ALL, rv, slot, 0, NULL, NULL, 0, NULL, 0);
	return rv;
}

/* refuse is what a token says that counts wrong PINs and is given one, with
 * W_PIN_TRIES not 0. */
static rv_t refuse(void)
{
	if (get(W_PIN_WRONG) >= get(W_PIN_TRIES))
		return PIN_LOCKED;
	atomic_fetch_add(&words[W_PIN_WRONG], 1);
	return PIN_INCORRECT;
}

static rv_t login(ulong_t session, ulong_t user, p pin, ulong_t len)
{
	struct session s = known(session);
	rv_t rv = enter(LOGIN, SESSION);
	int user_pin = user == 1; /* CKU_USER */
	ulong_t injected = rv ? INJECTED : 0;
	if (user_pin)
		atomic_fetch_add(&words[W_LOGINS], 1);
	if (rv == OK && user_pin && get(W_PIN_TRIES)) {
		rv = refuse();
		injected = INJECTED;
	}
	if (rv == OK)
		rv = leave(LOGIN, ASK(LOGIN, (ulong_t, ulong_t, p, ulong_t), (session, user, pin, len)));
	if (user_pin)
		note(LOGIN, rv, s.slot, injected, NULL, NULL, 0, NULL, 0);
	return rv;
}

static rv_t logout(ulong_t session)
{
	struct session s = known(session);
	rv_t rv = enter(LOGOUT, SESSION);
	if (rv == OK)
		rv = leave(LOGOUT, ASK(LOGOUT, (ulong_t), (session)));
	note(LOGOUT, rv, s.slot, 0, NULL, NULL, 0, NULL, 0);
	return rv;
}

/* identify notes in the table which key a session signs with, and says whether
 * this key shall fail, and with what. */
static rv_t identify(ulong_t session, ulong_t key)
{
	struct { ulong_t type; void *value; ulong_t len; } id;
	octet value[32];
	id.type = 0x102; /* CKA_ID */
	id.value = value;
	id.len = sizeof value;
	rv_t rv = ASK(GET_ATTRIBUTE, (ulong_t, ulong_t, p, ulong_t), (session, key, &id, 1));
	pthread_mutex_lock(&table_lock);
	for (int i = 0; i < TABLE; i++)
		if (table[i].handle == session) {
			table[i].id_len = rv == OK ? cut(id.len, sizeof value) : 0;
			memcpy(table[i].id, value, table[i].id_len);
			break;
		}
	pthread_mutex_unlock(&table_lock);
	ulong_t begin = 0;
	if (rv == OK)
		memcpy(&begin, value, cut(id.len, sizeof begin));
	return begin == get(W_KEY_ID) ? get(W_KEY_RV) : OK;
}

static rv_t sign_init(ulong_t session, p mechanism, ulong_t key)
{
	rv_t rv = enter(SIGN_INIT, SESSION);
	if (rv != OK)
		return rv;
	rv = identify(session, key);
	if (rv != OK)
		return rv;
	return leave(SIGN_INIT, ASK(SIGN_INIT, (ulong_t, p, ulong_t), (session, mechanism, key)));
}

/* spoil flips a bit of every n-th signature. */
static ulong_t spoil(octet *sig, ulong_t len)
{
	ulong_t n = atomic_fetch_add(&words[W_SIGNS], 1) + 1;
	ulong_t every = get(W_CORRUPT_EVERY);
	if (every == 0 || n % every != 0 || len == 0)
		return 0;
	sig[len - 1] ^= 1;
	atomic_fetch_add(&words[W_CORRUPTED], 1);
	return CORRUPTED;
}

/* signed_by records a signature that was made, and says what to answer. */
static rv_t signed_by(const struct session *s, ulong_t function, const void *data, ulong_t len, octet *sig, ulong_t siglen)
{
	octet made[96];
	memcpy(made, sig, cut(siglen, sizeof made));
	ulong_t flags = spoil(sig, siglen);
	rv_t rv = leave(function, OK);
	note(function, rv, s->slot, flags | (rv ? INJECTED : 0), s, data, len, made, cut(siglen, sizeof made));
	return rv;
}

static rv_t sign(ulong_t session, p data, ulong_t len, octet *sig, ulong_t *siglen)
{
	if (sig == NULL) /* asks for the length */
		return ASK(SIGN, (ulong_t, p, ulong_t, octet *, ulong_t *), (session, data, len, sig, siglen));
	struct session s = known(session);
	rv_t rv = enter(SIGN, SESSION);
	if (rv != OK)
		return rv;
	raise_to(W_PEAK, atomic_fetch_add(&words[W_RUNNING], 1) + 1);
	ulong_t delay = get(W_DELAY_US);
	if (delay)
		nap(delay);
	hang(SIGN);
	rv = ASK(SIGN, (ulong_t, p, ulong_t, octet *, ulong_t *), (session, data, len, sig, siglen));
	if (rv == OK)
		rv = signed_by(&s, SIGN, data, len, sig, *siglen);
	atomic_fetch_sub(&words[W_RUNNING], 1);
	return rv;
}

/* sign_final ends a signature in parts; what was signed is not in its record. */
static rv_t sign_final(ulong_t session, octet *sig, ulong_t *siglen)
{
	struct session s = known(session);
	rv_t rv = enter(SIGN_FINAL, SESSION);
	if (rv == OK)
		rv = ASK(SIGN_FINAL, (ulong_t, octet *, ulong_t *), (session, sig, siglen));
	if (rv == OK && sig != NULL)
		rv = signed_by(&s, SIGN_FINAL, NULL, 0, sig, *siglen);
	return rv;
}

/* map maps the control file. */
static int map(const char *path)
{
	int fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return 0;
	void *at = mmap(NULL, WORDS * sizeof *words + RING * sizeof *ring, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	if (at == MAP_FAILED)
		return 0;
	words = at;
	ring = (struct record *)(words + WORDS);
	return 1;
}

/* load finds the real module's functions. */
static struct list *load(const char *path)
{
	void *lib = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	rv_t (*list)(struct list **) = lib ? (rv_t (*)(struct list **))dlsym(lib, "C_GetFunctionList") : NULL;
	struct list *found;
	return list != NULL && list(&found) == OK ? found : NULL;
}

rv_t C_GetFunctionList(struct list **out)
{
	static pthread_mutex_t once = PTHREAD_MUTEX_INITIALIZER;
	pthread_mutex_lock(&once);
	const char *module = getenv("CHANCERY_SHIM_MODULE");
	const char *control = getenv("CHANCERY_SHIM_CONTROL");
	struct list *found = real;
	if (found == NULL && module != NULL && control != NULL && map(control) && (found = load(module)) != NULL) {
		ours = *found;
#define SET(n, name, kind, params, args) ours.f[n] = name;
		EACH_PLAIN(SET)
		ours.f[INITIALIZE] = initialize;
		ours.f[FINALIZE] = finalize;
		ours.f[GET_FUNCTION_LIST] = C_GetFunctionList;
		ours.f[GET_SLOT_LIST] = get_slot_list;
		ours.f[GET_TOKEN_INFO] = get_token_info;
		ours.f[OPEN_SESSION] = open_session;
		ours.f[CLOSE_SESSION] = close_session;
		ours.f[CLOSE_ALL] = close_all_sessions;
		ours.f[LOGIN] = login;
		ours.f[LOGOUT] = logout;
		ours.f[SIGN_INIT] = sign_init;
		ours.f[SIGN] = sign;
		ours.f[SIGN_FINAL] = sign_final;
		real = found;
	}
	pthread_mutex_unlock(&once);
	if (found == NULL)
		return GENERAL_ERROR;
	rv_t rv = enter(GET_FUNCTION_LIST, MODULE);
	*out = &ours;
	return rv;
}
