-- MARK: put a phase event at the log's end, once for each phase of an epoch.
-- KEYS 1 state, 2 log. ARGV 1 epoch, 2 phase, 3 the event's data.
local state = redis.call('HMGET', KEYS[1], 'epoch', 'fence', 'end', 'tlen', 'fenced_us', 'seq', 'phase', 'marked')
if not state[1] or tonumber(state[1]) < tonumber(ARGV[1]) then
  return {'ABSENT'} -- also where Redis was emptied and an older epoch was opened since: this one's is gone
end
if state[1] ~= ARGV[1] then
  return {'STALE', state[1]}
end
if state[2] then
  return {'FENCED', state[3], state[4], state[2], state[5]}
end
if state[7] == ARGV[2] and state[8] == ARGV[1] then
  return {'OK', state[3]}
end
local seq = tonumber(state[6]) + 1
redis.call('XADD', KEYS[2], state[3] .. '-' .. seq, 'p', ARGV[3])
if state[3] == '0' and seq == 1 then
  redis.call('PEXPIRE', KEYS[2], redis.call('PTTL', KEYS[1]))
end
redis.call('HSET', KEYS[1], 'seq', seq, 'phase', ARGV[2], 'marked', ARGV[1])
return {'OK', state[3]}
